"""One layer's physical experts as the stock experts module calls them."""

from functools import partial
from typing import Any

import torch

from polymoe.kernels.cpu.compressed_experts import experts_compressed
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.grouped_experts import experts_by_group, experts_by_grouped_mm, experts_by_loop
from polymoe.kernels.cpu.grouped_linear import why_not_grouped
from polymoe.kernels.cpu.packed_experts import why_not_fused, why_not_packed
from polymoe.kernels.cpu.tiles import ACTIVATIONS, Activations, tiled_layer
from polymoe.model.backends.context import ForwardContext
from polymoe.model.experts.cache import ExpertCache, Weights
from polymoe.model.experts.mapped_layer import MappedLayer
from polymoe.protocol.fast_path import FastPath


class LayerExperts:
    """One layer's physical experts and its slices of the tables; attached to the stock experts module.

    `delta`, `sign` `[V, E]` and `compressed` are None where every resident expert is stored as it is, without deltas.
    `transposed`: whether `resident` is `[in, out]`.
    """

    def __init__(
        self,
        layer: int,
        table: torch.Tensor,
        resident: dict[str, torch.Tensor],
        cache: ExpertCache,
        ctx: ForwardContext,
        compressed: CompressedLayer | None = None,
        delta: torch.Tensor | None = None,
        sign: torch.Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        self.layer, self.table, self.resident, self.cache, self.context = layer, table, resident, cache, ctx
        self.transposed = transposed
        self.compressed, self.delta, self.sign = compressed, delta, sign
        self.num_absent = max(0, -int(table.min()))  # host experts of the layer
        self.all_resident = self.num_absent == 0
        self.next: LayerExperts | None = None
        self.mapped: MappedLayer | None = None  # how decode steps read absent experts without waiting
        self._supported: bool | None = None
        self.activation_bits = ACTIVATIONS["int16"]
        # Stored experts in the form whose kernel computes them beside absent ones, on a CPU in bfloat16.
        here = cache.device.type == "cpu" and cache.dtype == torch.bfloat16 and ctx.kernels is None
        mixed = here and compressed is None and bool(resident) and not self.all_resident
        self._beside_absent = CompressedLayer(resident, (), (), transposed) if mixed else None

    def weights_of(self, module: Any, physical: int) -> Weights:
        """Tensors of a physical expert as the stock module has them: a view of the resident stack, or fetched."""
        if physical < 0:
            return self.cache.get(self.layer, -1 - physical)
        own = {name: stack[physical] for name, stack in self.resident.items()}
        if module.is_transposed and not self.transposed:
            own = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in own.items()}
        return own

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The layer's experts for `hidden [T, H]` with each variant's own routing `[T, K]`."""
        token_variant = self.context.batch.segments(hidden.shape[0]).token_variant
        if self._on_device(module):
            return self._forward_on_device(module, hidden, top_k_index, top_k_weights, token_variant)
        entry = token_variant[:, None], top_k_index
        physical = self.table[entry]
        weights_of = partial(self.weights_of, module)
        if self.compressed is not None:
            if not self.all_resident:
                self._announce(physical)
            delta = None if self.delta is None else self.delta[entry]
            sign = None if self.sign is None else self.sign[entry]
            return experts_compressed(
                module, hidden, physical, token_variant, delta, sign, top_k_weights, self.compressed, weights_of,
                self.activation_bits,
            )  # fmt: skip
        if self.all_resident and hidden.is_cuda and hidden.dtype == torch.bfloat16:  # no kernel for this module
            return experts_by_grouped_mm(module, hidden, physical, top_k_weights, self.resident)
        if hidden.device.type == "cpu" and not self.transposed and (self.all_resident or bool((physical >= 0).all())):
            return experts_by_group(module, hidden, physical, top_k_weights, self.resident)
        self._announce(physical)
        if self._beside_absent is not None:
            return experts_compressed(
                module, hidden, physical, token_variant, None, None, top_k_weights, self._beside_absent, weights_of
            )
        return experts_by_loop(module, hidden, physical, top_k_weights, weights_of)

    def prepare(self, module: torch.nn.Module, activations: Activations) -> None:
        """Lay packed experts out as the fastest kernel reads them; on a CPU in bfloat16. To be called once, when the
        layer is loaded. activations: the bits that they are multiplied in there."""
        if self.compressed is not None and self.context.kernels is None and self.cache.device.type == "cpu":
            self.compressed, self.activation_bits = tiled_layer(module, self.compressed, self.cache.dtype), activations

    def path(self, module: torch.nn.Module) -> FastPath:
        """What the layer's resident experts run on."""
        dtype = self.cache.dtype

        def path(runs_on: str, reason: str = "", slow: bool = False) -> FastPath:
            return FastPath(part="experts", runs_on=runs_on, count=1, reason=reason, slow=slow)

        if self._on_device(module):
            return path("GPU kernels")
        if self.context.kernels is not None or self.cache.device.type != "cpu":
            return path("torch", "the GPU kernels do not know this module", slow=True)
        if self.compressed is not None:
            if reason := why_not_packed(self.compressed):
                return path("torch packed", reason, slow=True)
            reason = why_not_fused(module, dtype, self.compressed)
            if self.compressed.is_tiled:
                return path(f"compiled packed, {self.activation_bits.gate_up} and {self.activation_bits.down} bits")
            return path("compiled packed", reason and f"each product by itself: {reason}")
        if reason := why_not_grouped(dtype, [stack.shape[-1] for stack in self.resident.values() if stack.ndim == 3]):
            return path("torch stored", reason, slow=dtype == torch.bfloat16)  # 3 to 6 times; others have no kernel
        return path("compiled stored")

    def path_of_absent(self) -> FastPath | None:
        """What the layer's absent experts run on, in steps that need any."""
        if self.all_resident:
            return None
        reason = "fetched when they are needed, one at a time"
        return FastPath(part="absent experts", runs_on="torch", count=1, reason=reason)

    def _on_device(self, module: torch.nn.Module) -> bool:
        """Whether a GPU's kernels compute this layer; asked once."""
        if self.context.kernels is None:
            return False
        if self._supported is None:
            self._supported = self.context.kernels.supports_experts(module, self.compressed or self.resident)
        return self._supported

    def _forward_on_device(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        token_variant: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` by a GPU's kernels. The host waits only for absent experts that are not mapped, to learn which are
        needed."""
        kernels, tables = self.context.kernels, (self.table, self.delta, self.sign)
        assert kernels is not None
        if self.mapped is not None and self.context.batch.is_decode:
            self.mapped.count(token_variant, top_k_index)
            tables = (self.mapped.table, self.delta, self.sign)
            return kernels.experts(
                module, hidden, top_k_index, top_k_weights, token_variant, tables, self.mapped.weights, num_absent=0
            )
        weights = self.compressed or self.resident
        out = kernels.experts(
            module, hidden, top_k_index, top_k_weights, token_variant, tables, weights, self.num_absent
        )
        if self.all_resident:
            return out
        physical = self.table[token_variant[:, None], top_k_index]
        token, k = (physical < 0).nonzero(as_tuple=True)
        on_host = self._on_host(physical[token, k])
        self._announce(physical.index_put((token[on_host], k[on_host]), physical.new_zeros(())))
        absent = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        # First what the device computes, so that it is busy while the host computes the rest.
        for chosen, device, weights_of in (
            (~on_host, hidden.device, partial(self.weights_of, module)),
            (on_host, torch.device("cpu"), self._host_weights_of),
        ):
            rows, column = token[chosen], k[chosen]
            if len(rows):
                given = hidden[rows], physical[rows, column, None], top_k_weights[rows, column, None]
                x, ids, gate = (tensor.to(device) for tensor in given)
                own = experts_by_loop(module, x, ids, gate, weights_of)
                absent.index_add_(0, rows, own.to(hidden.device).float())
        return (absent + out).to(hidden.dtype)

    def _on_host(self, ids: torch.Tensor) -> torch.Tensor:
        """`[n]` bool: which of these (token, absent expert) pairs the host computes; one answer an expert."""
        found, which, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        answers = [self.cache.on_host(self.layer, -1 - expert, rows) for expert, rows in pairs]
        return torch.tensor(answers, dtype=torch.bool, device=ids.device)[which]

    def _host_weights_of(self, physical: int) -> Weights:
        found = self.cache.host_expert(self.layer, -1 - physical)
        return {name: tensor.to(self.cache.dtype) for name, tensor in found.items()}

    def _announce(self, physical: torch.Tensor) -> None:
        """Tell the cache which absent experts this layer needs, in the loop's order, and the next one's after them.

        A pass with at least as many (token, expert) pairs as experts touches nearly all of them (prefill): then the
        next layer's are known before its router has run.
        """
        needed = [(self.layer, -1 - p) for p in torch.unique(physical).tolist() if p < 0]
        if self.next is not None and physical.numel() >= self.table.shape[1]:
            present = [variant for variant, _, _ in self.context.batch.segments(physical.shape[0]).spans]
            coming = torch.unique(self.next.table[present])
            needed += [(self.next.layer, -1 - p) for p in coming.tolist() if p < 0]
        self.cache.expect(needed)


def polymoe_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with transformers' experts registry under the name `polymoe`."""
    out: torch.Tensor = module.polymoe_experts.forward(module, hidden_states, top_k_index, top_k_weights)
    return out
