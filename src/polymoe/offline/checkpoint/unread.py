"""Stored tensors that no stock model reads: named and left out. Anything else without a place is an error."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymoe.config import format_bytes
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.source import some

# Old checkpoints store rotary tables and position ids, which are computed now; transformers skips these as well.
_TABLES = re.compile(r"rotary_(pos_)?emb\.(original_)?(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$")
# Layers that predict further tokens, by their names or by what only they have.
_PREDICTION = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?(\.|$)", re.IGNORECASE)
# Towers and projectors of a multimodal model, of which the text model is served.
_TOWERS = re.compile(
    r"^(model\.)?(visual|vision_\w+|audio_\w+|image_\w+|video_\w+|\w*_tower|(multi_modal|mm|vision)_projector|"
    r"embed_(vision|audio)|resampler_model|talker|code2wav)\."
)
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Unread:
    """`tables`: rotary tables and position ids. `prediction`: multi-token prediction. `towers`: what reads images and
    sound. `declared`: what the model's
    class itself names as not loaded. `strange`: the rest, which nothing explains."""

    tables: tuple[str, ...]
    prediction: tuple[str, ...]
    towers: tuple[str, ...]
    declared: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What may be left out."""
        return (*self.tables, *self.prediction, *self.towers, *self.declared)

    def notes(self, class_name: str, num_bytes: Mapping[str, int]) -> list[str]:
        """One line for each kind that there is, with its bytes. `num_bytes`: name -> what it takes in the files."""
        kinds = (
            ("rotary tables, which are computed", self.tables),
            ("multi-token prediction", self.prediction),
            ("towers and projectors for images and sound", self.towers),
            ("named by the class as not loaded", self.declared),
        )
        return [
            f"left out: {some(names)} ({kind}; {len(names)} in all, "
            f"{format_bytes(sum(num_bytes[name] for name in names))}), which {class_name} does not read"
            for kind, names in kinds
            if names
        ]


def sort_unread(model: Any, unmatched: Sequence[str], stored: Sequence[str], left_out: Collection[str] = ()) -> Unread:
    """Sort the names of `stored` that have no place in `model`; `left_out`: of parts that it was built without.

    Raises `CheckpointError` for whole layers beyond `num_hidden_layers` that are no different from those below: then
    config.json is wrong, and leaving them out would serve half a model.
    """
    declared = re.compile("|".join(f"({p})" for p in model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    multimodal = bool(getattr(model.config, "left_out_inputs", None))
    layers = _layers(stored)
    found: dict[str, list[str]] = {"tables": [], "prediction": [], "towers": [], "declared": [], "strange": []}
    for name in unmatched:
        layer = _LAYER.match(name)
        if _TABLES.search(name):
            kind = "tables"
        elif _PREDICTION.search(name):
            kind = "prediction"
        elif multimodal and (_TOWERS.search(name) or name in left_out):
            kind = "towers"
        elif layer is not None and depth is not None and int(layer[2]) >= depth and layer[1].count("layers") == 1:
            own = layers[layer[1], int(layer[2])]
            if not declared.search(name) and any(layers.get((layer[1], below)) == own for below in range(depth)):
                raise CheckpointError(
                    f"{layer[1]}.{layer[2]} is a layer like the others, but config.json says num_hidden_layers "
                    f"{depth}; correct it, or save the model again without the layer."
                )
            kind = "prediction"
        else:
            kind = "declared" if declared.search(name) else "strange"
        found[kind].append(name)
    return Unread(**{kind: tuple(names) for kind, names in found.items()})


def _layers(stored: Sequence[str]) -> dict[tuple[str, int], frozenset[str]]:
    """(path of the list, index) -> names of the tensors within that layer, rotary tables aside."""
    found: dict[tuple[str, int], set[str]] = {}
    for name in stored:
        if (match := _LAYER.match(name)) and not _TABLES.search(name):
            found.setdefault((match[1], int(match[2])), set()).add(match[3])
    return {key: frozenset(names) for key, names in found.items()}
