"""Where a pass waits for a variant that is still arriving: at the first module that reads what has not come yet.

Nothing here knows an architecture: a tensor is waited for by the element of a module list that holds it (a decoder
layer), or where there is none by its own module (embeddings, the last norm, the head).
"""

import torch

from polymoe.model.variants.slots import Slots


def gate_slots(model: torch.nn.Module, slots: Slots) -> None:
    """Let the model's parts wait for their own tensors, and copies come in the order in which a pass reads them."""
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    groups = {name: _reader(model, name) for name in slots.stacks}
    slots.groups = groups
    slots.stacks = {name: slots.stacks[name] for name in sorted(groups, key=lambda name: order[groups[name]])}
    for path in dict.fromkeys(groups.values()):
        model.get_submodule(path).register_forward_pre_hook(_Gate(slots, path))


def _reader(model: torch.nn.Module, name: str) -> str:
    """Path of the module that waits for a tensor."""
    *path, _ = name.split(".")
    module = model
    for depth, part in enumerate(path, start=1):
        parent, module = module, module.get_submodule(part)
        if isinstance(parent, torch.nn.ModuleList):
            return ".".join(path[:depth])
    return ".".join(path)


class _Gate:
    """A forward pre-hook."""

    def __init__(self, slots: Slots, group: str) -> None:
        self.slots, self.group = slots, group

    def __call__(self, _module: torch.nn.Module, _args: object) -> None:
        self.slots.wait(self.group)
