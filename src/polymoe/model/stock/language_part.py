"""The language part of a multimodal model: the stock class as it is, without what only images and sound reach."""

import re
from typing import Any

# Experts, routers and the like that stand beside the text's own within a decoder, for tokens of other inputs.
_OF_OTHER_INPUTS = re.compile(r"^(vision|visual|image|audio|video|speech)(_\w+)?$")


def leave_out_other_inputs(model: Any) -> None:
    """Take away from `model` every part that is neither its decoder nor its head, and within the decoder what is named
    after other inputs. Its own forward computes what it does for text; reaching what is gone is an error there.

    `model.left_out` names them: paths below the model.
    """
    kept = {id(model.get_decoder()), id(model.get_output_embeddings())}
    paths = {path for path, module in model.named_modules(remove_duplicate=False) if id(module) in kept}
    around = {path[:end] for path in paths for end in (0, *(i for i, c in enumerate(path) if c == "."))}
    left_out: list[str] = []
    for path, module in list(model.named_modules()):
        if path in around:
            prefix = f"{path}." if path else ""
            for name in [n for n, part in module._modules.items() if part is not None]:
                if prefix + name not in around | paths:
                    module._modules[name] = None
                    left_out.append(prefix + name)
            for owned in (module._parameters, module._buffers):
                for name in [n for n, tensor in owned.items() if tensor is not None]:
                    owned[name] = None
                    left_out.append(prefix + name)
        elif any(path.startswith(f"{own}.") or path == own for own in paths):
            for name in [n for n in module._modules if _OF_OTHER_INPUTS.match(n)]:
                module._modules[name] = None
                left_out.append(f"{path}.{name}")
    model.left_out = tuple(left_out)


def is_left_out(model: Any, name: str) -> bool:
    """Whether the parameter or buffer `name` belongs to a part that was taken away, with or without a prefix of the
    base model."""
    prefix = f"{model.base_model_prefix}."
    return any(
        name == path or name.startswith(f"{path}.")
        for left_out in getattr(model, "left_out", ())
        for path in {left_out, left_out.removeprefix(prefix)}
    )
