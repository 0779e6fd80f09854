"""A variant in stock transformers with the weights that are read of it: what stands for its original where transformers
alone would not load it so (fewer bits, adapters, patches)."""

from typing import Any

import torch

from polymoe.model.stock.kind import LanguagePart, kind_of
from polymoe.model.stock.skeleton import float32_weights
from polymoe.offline.checkpoint.checkpoint import Checkpoint

_SWITCH = {"up_proj": "wi.weight", "down_proj": "wo.weight"}  # stacked here, a module an expert in transformers


@torch.no_grad()
def loaded_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Runs in `dtype`, but for what transformers keeps in float32 then. Needs memory for one model and one tensor."""
    kind = kind_of(checkpoint.config)
    model = kind.auto.from_config(checkpoint.config, dtype=dtype)
    if isinstance(kind, LanguagePart):
        kind.prepare(model)
    state, in_float32 = model.state_dict(), float32_weights(model, dtype)
    for target in checkpoint.target_names:
        tensor = checkpoint.tensor(target)
        if target in state:
            if target in in_float32:
                parent, _, leaf = target.rpartition(".")
                setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor.float(), requires_grad=False))
            else:
                state[target].copy_(tensor)
            continue
        module, _, leaf = target.rpartition(".")
        for expert, row in enumerate(tensor):
            state[f"{module}.expert_{expert}.{_SWITCH[leaf]}"].copy_(row)
    return model.eval()
