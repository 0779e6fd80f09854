"""One token of the gated delta rule, the linear attention of Gated DeltaNet, for each of a batch of sequences.

    S ← exp(g) S,  S ← S + k ⊗ β (v − kᵀ S),  out = qᵀ S / √K        (https://arxiv.org/abs/2412.06464, equation 10)

with a state S `[K, V]` for each head, k and q of length 1 where that is asked for. torch takes seven passes over the
states for it, the kernel two.
"""

import torch

from polymoe.native.library import cpu_kernels, kernel_threads

_LANES = 16
_EPSILON = 1e-6


def gated_delta_step(
    state: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor,
    beta: torch.Tensor, normalise: bool,
) -> torch.Tensor:  # fmt: skip
    """The reference; arguments as `fast_gated_delta_step`."""
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], dim=1) for x in (query, key))
    if normalise:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (query, key))
    state *= gate.exp()[..., None, None]
    known = (state * key[..., None]).sum(-2)
    state += key[..., None] * ((value - known) * beta[..., None])[..., None, :]
    out: torch.Tensor = (state * query[..., None]).sum(-2) * query.shape[-1] ** -0.5
    return out


def is_fast_gated_delta(state: torch.Tensor) -> bool:
    """Whether the compiled kernel takes these states."""
    plain = state.device.type == "cpu" and state.dtype == torch.float32 and state.is_contiguous()
    return plain and state.ndim == 4 and state.shape[-1] % _LANES == 0 and cpu_kernels() is not None


def fast_gated_delta_step(
    state: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor,
    beta: torch.Tensor, normalise: bool,
) -> torch.Tensor:  # fmt: skip
    """The compiled kernel (gated_delta.cpp), for what `is_fast_gated_delta` allows. All float32.

    Args:
        state: `[B, H, K, V]`, changed in place.
        query, key: `[B, G, K]`; heads h of a group of H / G read the same.
        value: `[B, H, V]`.
        gate, beta: `[B, H]`; gate is the logarithm of the decay.

    Returns: `[B, H, V]`.
    """
    kernels = cpu_kernels()
    assert kernels is not None
    batch, heads, keys, values = state.shape
    query, key, value, gate, beta = (x.float().contiguous() for x in (query, key, value, gate, beta))
    assert query.shape == key.shape == (batch, key.shape[1], keys)
    assert heads % key.shape[1] == 0
    assert value.shape == (batch, heads, values)
    assert gate.shape == beta.shape == (batch, heads)
    out = torch.empty_like(value)
    kernels.polymoe_gated_delta_f32(
        state.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(), gate.data_ptr(), beta.data_ptr(),
        batch, heads, key.shape[1], keys, values, int(normalise), out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out
