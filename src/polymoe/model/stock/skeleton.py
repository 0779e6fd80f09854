"""The stock model definition with its weights left out.

Nothing here knows an architecture by name. The network comes from transformers on the meta device; experts and
attention go through polymoe's entries in transformers' registries. `polymoe.model.stock.probe` shows whether the
result can be served.
"""

import copy
import inspect
import re
from typing import Any

import torch
from transformers import PreTrainedModel

from polymoe.errors import UnsupportedModelError
from polymoe.model.stock.kind import IMPLEMENTATION, kind_of
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.model.variants.variant_stack import VariantStack


def build_skeleton(
    config: Any, attention: str = IMPLEMENTATION, dtype: torch.dtype | None = None
) -> PreTrainedModel:  # fmt: skip
    """The stock definition of `config`: parameters on the meta device, computed buffers on the CPU.

    `attention` names the entry of transformers' attention registry that it uses. `dtype`: None, the config's.
    """
    config = copy.deepcopy(config)
    model = kind_of(config).build(config, attention, dtype)
    _materialise_computed_buffers(model)
    return model


def _materialise_computed_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies …) are computed by the model's own initialiser.

    Raises `UnsupportedModelError` for one that the initialiser leaves as it was.
    """
    for path, module in model.named_modules():
        computed = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        if not computed:
            continue
        results = []
        for filling in (0, 1):  # what is still there in the end was not computed
            for name in computed:
                buffer = module._buffers[name]
                assert buffer is not None
                module._buffers[name] = torch.full_like(buffer, filling, device="cpu")
            model._init_weights(module)
            results.append({name: module._buffers[name] for name in computed})
        for name in computed:
            first, second = (result[name] for result in results)
            assert first is not None
            assert second is not None
            if not torch.equal(first, second):
                raise UnsupportedModelError(
                    f"{path}.{name} is computed in a way that {type(model).__name__} does not expose."
                )


def expert_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """(path, module) of every routed-experts module, in layer order."""
    return [(p, m) for p, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")]


def expert_tensor_names(module: Any) -> list[str]:
    """Names of a routed-experts module's own tensors; axis 0 of each runs over experts."""
    return [name for name, p in module._parameters.items() if p is not None]


def set_weight(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    """Put `value` (plain tensor, `VariantStack` or `PackedVariants`) where the parameter or buffer `name` is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    is_buffer = leaf in module._buffers
    module._buffers.pop(leaf, None)
    module._parameters.pop(leaf, None)
    if isinstance(value, VariantStack | PackedVariants):
        setattr(module, leaf, value)
    elif is_buffer:
        module.register_buffer(leaf, value)
    else:
        module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))


def float32_weights(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """The weights of a stock model that transformers computes in float32 although the model runs in `dtype`.

    Its lists hold regular expressions that are searched for in a name, `*` for anything (`mlp.gate.weight`, `conv1d`).
    Others are made in float32 by the definition itself, whatever the model's dtype.
    """
    kind = kind_of(model.config)
    kept: set[str] = set()
    made: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
        half = kind.build(copy.deepcopy(model.config), IMPLEMENTATION, dtype)
        made = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in kept]
    return frozenset(
        name
        for name in model.state_dict()
        if name in made or kind.keeps_float32(model, name) or any(pattern.search(name) for pattern in patterns)
    )


def accepts_logits_to_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def context_limit(config: Any) -> int:
    """Longest sequence, in tokens, that the configured positions cover; an encoder and its decoder have half each."""
    return kind_of(config).context_limit(config)


def retie(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Make every tied weight (target -> source) the same object as its source."""
    for target, source in tied.items():
        path, _, leaf = source.rpartition(".")
        value = getattr(model.get_submodule(path), leaf)
        if isinstance(value, VariantStack | PackedVariants):
            set_weight(model, target, value)
        else:
            target_path, _, target_leaf = target.rpartition(".")
            setattr(model.get_submodule(target_path), target_leaf, value)
