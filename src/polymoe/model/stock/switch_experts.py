"""The routed experts of Switch Transformers, stacked.

transformers holds them as a dictionary of modules, `expert_0.wi`, `expert_0.wo`, …, outside its experts interface. Here
they become what every other architecture has: one tensor a projection with an axis over experts, `up_proj [E, I, H]`
(wi) and `down_proj [E, H, I]` (wo), and a forward pass that goes to polymoe's expert pool.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

STACKED = {"wi.weight": "up_proj", "wo.weight": "down_proj"}
_STORED = re.compile(r"^(?P<module>.+\.mlp\.experts)\.expert_(?P<expert>\d+)\.(?P<leaf>w[io]\.weight)$")


class SwitchExperts(nn.Module):
    """Stands where `SwitchTransformersExperts` stood, with the same call.

    The four attributes are those of modules behind transformers' experts interface; `polymoe_experts` is set by whoever
    serves the model.
    """

    has_gate = False
    has_bias = False
    is_transposed = False
    is_concatenated = False

    def __init__(self, stock: SwitchTransformersExperts) -> None:
        super().__init__()
        first = stock["expert_0"]
        self.num_experts: int = stock.num_experts
        self.act_fn = first.act
        for leaf, name in STACKED.items():
            shape = first.get_parameter(leaf).shape
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *shape, device="meta")))

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states [N, H]`, `selected_experts [N, 1, E]` one-hot, all zero for a token beyond its expert's
        capacity (which then gets zero), `routing_weights [N, 1]` -> `[N, H]`."""
        index = selected_experts.argmax(dim=-1)
        taken = selected_experts.sum(dim=-1).to(routing_weights.dtype)
        layer: Any = self.polymoe_experts
        out: torch.Tensor = layer.forward(self, hidden_states, index, routing_weights * taken)
        return out


def stack_switch_experts(model: PreTrainedModel) -> None:
    """Replace every `SwitchTransformersExperts` of a model on the meta device."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SwitchTransformersExperts):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SwitchExperts(module))


def stacked_name(stored: str) -> tuple[str, int] | None:
    """`….mlp.experts.expert_3.wi.weight` -> (`….mlp.experts.up_proj`, 3); None for any other name."""
    found = _STORED.match(stored)
    return None if found is None else (f"{found['module']}.{STACKED[found['leaf']]}", int(found["expert"]))
