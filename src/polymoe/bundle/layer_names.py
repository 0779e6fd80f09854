"""What the layers with routed experts are called wherever a user reads of them."""

import re
from collections.abc import Sequence


def layer_names(expert_modules: Sequence[str]) -> list[str]:
    """The model's own number of each expert layer, behind the name of its stack where there are two ("encoder 1"); a
    leading dense layer makes it start at 1.

    Args: `expert_modules`: module path of each, as in a scan or a manifest.
    """
    found = [re.search(r"^(encoder|decoder)?\D*(\d+)", path) for path in expert_modules]
    return [
        str(index) if match is None else " ".join(part for part in match.groups() if part)
        for index, match in enumerate(found)
    ]
