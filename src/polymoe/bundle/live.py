"""What changed in a bundle since it was planned: variants that were added while it was served, and what names mean.

additions/VERSION/tables.safetensors       `table` int32 [L, E]: p < P the planned base p of the layer (or, below 0, its
                                           host expert), else own expert p − P; `delta` int32 and `sign` int8 [L, E]
                                           likewise, −1 for none
additions/VERSION/layer-000.safetensors    own experts of expert layer 0, a stack a tensor name, and own deltas,
                                           `{format}.{name}.{part}`, as in deltas/layer-000.safetensors
additions/VERSION/nonexperts.safetensors   own tensors, of some a delta on a packed matrix: `{format}.{name}.{part}`;
                                           the others are those of a planned variant
additions/VERSION/variant/                 config, generation config, tokenizer and chat template

An addition builds on what was planned and on no other addition, so that each can go whenever it likes. It is there once
the manifest lists it: its folder is written beside and renamed first, and an unlisted one is a leftover.
"""

import msgspec

ADDITIONS = "additions"
UNFINISHED = ".unfinished-"  # a folder below `additions` while it is written
ADDED_TABLES = "tables.safetensors"
ADDED_NONEXPERTS = "nonexperts.safetensors"
ADDED_VARIANT = "variant"
OWN = -1  # in place of the planned variant whose tensor it is


def added_layer(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def added_folder(version: str) -> str:
    return f"{ADDITIONS}/{version[:16]}"


class AddedDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A matrix that is the base of a planned variant's packed one, `base`, and a delta in the format `delta`."""

    base: int
    delta: str


class Addition(msgspec.Struct, frozen=True, kw_only=True):
    """One added version. L expert layers; sizes are bytes on the device, in the dtypes as stored."""

    name: str  # as it was added; others may point to it too
    version: str  # SHA-256, hex
    source: str
    source_path: str
    max_model_len: int
    vocab_size: int
    has_tokenizer: bool
    created: int  # seconds since the epoch
    own_experts: list[int]  # [L], stored as they are
    deltas: list[dict[str, int]]  # [L], format -> how many
    nonexperts: dict[str, int]  # name -> the planned variant with the identical tensor, or `OWN`
    expert_bytes: int
    delta_bytes: int
    nonexpert_bytes: int
    lossless: bool
    packed: dict[str, AddedDelta] = {}  # those of the own `nonexperts` that are not stored as they are
    shared_experts: int = 0  # of L · E, those that a planned variant is served with too

    @property
    def folder(self) -> str:
        return added_folder(self.version)

    @property
    def device_bytes(self) -> int:
        return self.expert_bytes + self.delta_bytes + self.nonexpert_bytes


class LiveState(msgspec.Struct, frozen=True, kw_only=True):
    """names: what `model` in a request means, name -> version. previous: name -> the version before, while it is held.
    pinned: versions that stay though nothing points to them. removed: planned versions that are gone."""

    names: dict[str, str]
    previous: dict[str, str] = {}
    pinned: list[str] = []
    removed: list[str] = []
    additions: list[Addition] = []

    @property
    def wanted(self) -> set[str]:
        """Versions that somebody may ask for again."""
        return {*self.names.values(), *self.previous.values(), *self.pinned}
