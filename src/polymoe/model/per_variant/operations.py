"""Compiled kernels in the place of functions that stock modules call: the module's own forward, with other functions
under the names that it looks up. transformers lets packages of GPU kernels take these places in the same way.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from polymoe.kernels.cpu.gated_delta import fast_gated_delta_step, is_fast_gated_delta


def with_fast_operations(module: Any) -> Callable[..., Any]:
    """The forward of `module`, unmodified, with what there is a kernel for."""
    stock = module.forward
    plain = inspect.unwrap(type(module).forward)
    names = set(plain.__code__.co_names) & set(_OPERATIONS)
    if "forward" in vars(module) or plain.__closure__ or not names:
        return stock  # type: ignore[no-any-return]
    own = {name: functools.partial(_OPERATIONS[name], plain.__globals__[name]) for name in names}
    copied = types.FunctionType(
        plain.__code__, {**plain.__globals__, **own}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copied.__kwdefaults__ = plain.__kwdefaults__
    return functools.partial(copied, module)


def _recurrent_gated_delta_rule(
    stock: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    g: torch.Tensor, beta: torch.Tensor, initial_state: torch.Tensor | None, use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """`torch_recurrent_gated_delta_rule` of one token, which changes `initial_state`: the cache is given it anyway."""
    if initial_state is None or query.shape[1] != 1 or not is_fast_gated_delta(initial_state):
        return stock(
            query, key, value, g=g, beta=beta, initial_state=initial_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **options,
        )  # fmt: skip
    now = [x[:, 0] for x in (query, key, value, g, beta)]
    out = fast_gated_delta_step(initial_state, now[0], now[1], now[2], now[3], now[4], use_qk_l2norm_in_kernel)
    return out[:, None].to(query.dtype), initial_state


_OPERATIONS: dict[str, Callable[..., Any]] = {"torch_recurrent_gated_delta_rule": _recurrent_gated_delta_rule}
