"""Which architectures can be served, and where their routed experts are.

Any decoder that goes through transformers' experts interface qualifies, unless it also has inputs other than text. Of
encoder–decoder models, Switch Transformers do. The answer comes when a plan is made, by name, never at request time. A
trial run of its forward pass follows (`polymoe.model.stock.probe`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polymoe.bundle.config_checks import OTHER_INPUTS
from polymoe.errors import UnsupportedModelError
from polymoe.model.stock.kind import kind_of


@dataclass(frozen=True)
class ArchitectureInfo:
    """The expert layers of one model. Names are paths below the model (`model.layers.0.mlp.experts`)."""

    model_type: str
    class_name: str
    expert_modules: tuple[str, ...]  # one a layer that has routed experts, in layer order; an encoder's first
    num_experts: int  # E
    expert_shapes: Mapping[str, tuple[int, ...]]  # tensor name within the module -> shape of one expert
    nonexperts: tuple[str, ...]  # every other parameter and persistent buffer; tied ones once
    vocab_tensors: tuple[str, ...]  # those of them with one row a token id

    @property
    def num_layers(self) -> int:
        """L, the layers that have routed experts."""
        return len(self.expert_modules)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return sum(torch.Size(shape).numel() for shape in self.expert_shapes.values())

    def expert_tensor(self, layer: int, tensor: str) -> str:
        """(1, "down_proj") -> "model.layers.1.mlp.experts.down_proj"; `layer` counts expert layers."""
        return f"{self.expert_modules[layer]}.{tensor}"


_WAY_OUT = "The README's table of architectures lists what is served."


def refusal(config: Any, reason: str, way_out: str = _WAY_OUT) -> UnsupportedModelError:
    names = getattr(config, "architectures", None) or [type(config).__name__]
    return UnsupportedModelError(f"{names[0]} (model_type {config.model_type}) cannot be served: {reason}. {way_out}")


def check_supported_config(config: Any) -> None:
    """Refuse what the config alone tells. Raises `UnsupportedModelError` with the reason."""
    other = [name for name in OTHER_INPUTS if getattr(config, name, None) is not None]
    if other and not getattr(config, "left_out_inputs", None):
        reason = (
            f"it takes images or sound ({', '.join(other)}), and transformers has no text model for its language part"
        )
        raise refusal(config, reason, "Save its text model on its own (…ForCausalLM), where it has one.")


def build_on_meta(config: Any) -> Any:
    """The stock transformers model without memory for its weights, every layer's experts stacked.

    Raises `UnsupportedModelError`.
    """
    kind = kind_of(config)
    if type(config) not in kind.classes:
        raise refusal(config, "transformers has no text-generation model for it")
    found = kind.classes[type(config)]
    name = (found if isinstance(found, type) else found[0]).__name__
    if not name.endswith(kind.head):
        raise refusal(config, f"{name} is not a model that writes text token by token")
    try:
        with torch.device("meta"):
            model = kind.auto.from_config(config, trust_remote_code=False)
        kind.prepare(model)
    except Exception as error:  # no such class for this config, or its constructor refuses the values
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = f"transformers cannot build a text model from its config ({reason})"
        raise refusal(config, reason, "Correct config.json.") from error
    return model


def is_experts_module(module: nn.Module) -> bool:
    """True for modules whose class went through transformers' `use_experts_implementation`, and for stacked ones."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def check_supported(config: Any, model: Any) -> ArchitectureInfo:
    """Find the routed experts of `model` (on the meta device) and refuse what cannot be served.

    Raises `UnsupportedModelError`, naming the architecture and the reason.
    """
    check_supported_config(config)
    if (reason := kind_of(config).why_not(model)) is not None:
        raise refusal(config, reason)
    experts = {path: module for path, module in model.named_modules() if is_experts_module(module)}
    if not experts:
        raise refusal(
            config,
            "it has no routed experts behind transformers' experts interface (a dense model shares nothing here)",
        )
    num_experts, shapes = _one_shape(config, experts)

    expert_names = {f"{path}.{tensor}" for path in experts for tensor in shapes}
    tied = model.all_tied_weights_keys
    nonexperts = tuple(name for name in model.state_dict() if name not in expert_names and name not in tied)
    return ArchitectureInfo(
        model_type=config.model_type,
        class_name=type(model).__name__,
        expert_modules=tuple(experts),
        num_experts=num_experts,
        expert_shapes=shapes,
        nonexperts=nonexperts,
        vocab_tensors=tuple(name for name in _vocab_tensors(model) if name in nonexperts),
    )


def _one_shape(config: Any, experts: Mapping[str, nn.Module]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """(E, {tensor: shape of one expert}), which must be the same in all expert layers."""
    found: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {}
    for path, module in experts.items():
        tensors = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        rows = {shape[0] if shape else 0 for shape in tensors.values()}
        if len(rows) != 1:
            raise refusal(config, f"the tensors of {path} do not all have one row an expert: {tensors}")
        found[path] = rows.pop(), {name: shape[1:] for name, shape in tensors.items()}
    first_path, first = next(iter(found.items()))
    for path, shapes in found.items():
        if shapes != first:
            raise refusal(config, f"its expert layers differ: {first_path} has {first}, {path} has {shapes}")
    return first


def _vocab_tensors(model: Any) -> list[str]:
    """Parameters of the input and output embeddings, which an encoder and a decoder may have of their own."""
    stacks = [part for part in (getattr(model, name, None) for name in ("encoder", "decoder")) if part is not None]
    ends = [model.get_output_embeddings(), *(part.get_input_embeddings() for part in (model, *stacks))]
    ends = [end for end in ends if end is not None]
    own = {id(parameter) for end in ends for parameter in end.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]
