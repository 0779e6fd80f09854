"""What a bundle says about itself: `manifest.json`, written last, so that a folder with one is whole.

manifest.json                       this, with a hash of itself and of every other file
tables.safetensors                  `table` int32 [V, L, E]; `delta` int32 and `sign` int8 [V, L, E] where there are any
experts/layer-000.safetensors       resident bases of expert layer 0: one stack [P, *shape] a tensor name for those
                                    stored as they are, `{format}.{name}.{part}` [P, …] for each packed format
deltas/layer-000.safetensors        deltas of expert layer 0: `{format}.{name}.{part}` [D, …]; exact ones have their
                                    `values` back to back, delta d's are starts[d] : starts[d + 1]
host/layer-000.safetensors          host tier of expert layer 0: `{h}.{tensor name}`, one expert's tensors each
nonexperts/shared.safetensors       tensors that are identical in all variants, and the bases that packed ones share:
                                    `{format}.{name}.{part}`
nonexperts/variant.NAME.safetensors NAME's own, packed or as stored, and its deltas; what some variants share is with
                                    the lowest of them
variants/NAME/                      config, generation config, tokenizer and chat template, as they came
additions/VERSION/                  a variant that was added while the bundle was served: see `live.py`
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from polymoe.bundle.live import ADDITIONS, LiveState
from polymoe.bundle.plain_files import why_not_to_read
from polymoe.errors import BundleError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNFINISHED_MANIFEST = ".manifest.json.tmp"  # while it is written anew
FOLDERS = ("experts", "deltas", "host", "nonexperts", "variants")
_READABLE = (FORMAT_VERSION, 3)  # 3: has additions, which older releases would not serve
TABLES = "tables.safetensors"
SHARED = "nonexperts/shared.safetensors"
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a file's name


def resident_file(layer: int) -> str:
    return f"experts/layer-{layer:03d}.safetensors"


def delta_file(layer: int) -> str:
    return f"deltas/layer-{layer:03d}.safetensors"


def packed_name(format_name: str, tensor: str, part: str) -> str:
    """("int4", "down_proj", "codes") -> "int4.down_proj.codes"; a bias has the part ""."""
    return f"{format_name}.{tensor}.{part}" if part else f"{format_name}.{tensor}"


def host_file(layer: int) -> str:
    return f"host/layer-{layer:03d}.safetensors"


def own_file(variant: str) -> str:
    return f"nonexperts/variant.{variant}.safetensors"


def variant_folder(variant: str) -> str:
    return f"variants/{variant}"


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """How close a served variant is to its original on one text; means over `tokens` predicted tokens."""

    text: str = ""  # the file that it was measured on, once it is kept
    tokens: int
    kl: float  # KL(original ‖ served), nats a token
    top1: float  # share of tokens where both rank the same one first
    perplexity_original: float
    perplexity_served: float
    # Nats a token, what the planner expected; stored under its old name.
    predicted_error: float | None = msgspec.field(default=None, name="predicted_damage")


class VariantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One served model. Hashes are SHA-256, hex."""

    name: str
    version: str  # over all that defines its answers: the weights that serve it, its configs and its tokenizer
    source: str  # as given: a folder or org/model[@revision]
    source_path: (
        str  # absolute, BASE+CHANGE where it has changes; only `polymoe eval` reads it, the bundle does not need it
    )
    source_hash: str  # over the original's tensors
    max_model_len: int  # tokens
    vocab_size: int  # rows of its embeddings
    dtype: str  # of the experts as stored: "bfloat16", …
    has_tokenizer: bool
    # Nats a token; None when the policy does not predict. Stored under its old name.
    predicted_error: float | None = msgspec.field(default=None, name="predicted_damage")
    fidelity: Fidelity | None = None  # None until measured


class DialPoint(msgspec.Struct, frozen=True, kw_only=True):
    """What so many bytes would buy, as the planner expected when it had the family before it."""

    expert_bytes: int  # bases and deltas, or all weights: `Manifest.dial_of`
    kl: float  # nats a token, mean of the variants
    top1: float  # share of tokens, likewise


class FileRecord(msgspec.Struct, frozen=True):
    """One file of the bundle, path relative to it."""

    path: str
    size: int  # bytes
    sha256: str


class WeightBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Weights on the device, by kind."""

    resident_experts: int  # bases, packed or not
    deltas: int
    nonexperts_shared: int
    nonexperts_own: int  # once for every variant, or slot, that has its own
    tables: int

    @property
    def by_kind(self) -> dict[str, int]:
        return msgspec.structs.asdict(self)

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


class PackedNonexpert(msgspec.Struct, frozen=True, kw_only=True):
    """How a non-expert matrix is packed: each version in format `base`, or, with a `delta`, one base and a delta of
    that format for each version. shape: [out, in]."""

    base: str
    delta: str | None = None
    shape: list[int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a bundle but the weights. Sizes are bytes."""

    format_version: int
    polymoe_version: str
    transformers_version: str
    policy: str
    memory: str  # the budget as asked for; "" for the policy's default
    model_type: str
    architecture: str  # class name of the stock model
    variants: list[VariantRecord]
    expert_modules: list[str]  # module path of each expert layer
    num_experts: int
    expert_shapes: dict[str, list[int]]  # tensor name -> shape of one expert
    expert_bytes: int  # one expert
    expert_parameters: int  # one expert
    nonexperts: dict[str, list[int]]  # name -> per variant, the lowest variant with the identical tensor
    packed_nonexperts: dict[str, PackedNonexpert] = {}  # those that are not as the checkpoints store them
    tied: dict[str, str]  # parameter -> the one it shares its tensor with
    transposed: bool  # the stock module holds its matrices as [in, out]; packed ones are [out, in] all the same
    base_pools: list[dict[str, int]]  # per layer: format -> physical bases, in the order of their ids
    delta_pools: list[dict[str, int]]  # per layer: format -> deltas, in the order of their ids
    host_experts: list[int]  # of each layer's host list
    positions: dict[str, int]  # shared, separate, absent
    resident_bytes: WeightBytes  # in the dtypes as stored
    host_bytes: int  # experts in the host tier
    bytes_per_expert_parameter: float  # bytes of bases and deltas over one model's expert parameters
    files: list[FileRecord]  # all but this one
    levels: Literal["grid", "free"] = "free"  # of the formats with a table; old bundles name none
    dial: list[DialPoint] = []  # by bytes; empty where the policy predicts nothing
    dial_of: Literal["experts", "all"] = "experts"  # what the bytes of its points are of
    position_errors: list[list[float]] = []  # [L][E] nats a token, mean of the variants; empty likewise
    live: LiveState | None = None  # what changed since it was planned; None: nothing
    digest: str = ""  # SHA-256, hex, of everything else in here; "" in bundles planned before there was one

    @property
    def live_state(self) -> LiveState:
        """Of a bundle that never changed: every variant under its own name."""
        return self.live or LiveState(names={variant.name: variant.version for variant in self.variants})

    @property
    def resident_experts(self) -> list[int]:
        """Physical bases of each layer."""
        return [sum(pools.values()) for pools in self.base_pools]

    def format_counts(self) -> dict[str, tuple[int, int]]:
        """Format -> (bases, deltas) of all layers, in the order of the pools."""
        names = dict.fromkeys(n for pools in (self.base_pools, self.delta_pools) for layer in pools for n in layer)
        return {
            name: (
                sum(layer.get(name, 0) for layer in self.base_pools),
                sum(layer.get(name, 0) for layer in self.delta_pools),
            )
            for name in names
        }


def nonexpert_format(manifest: Manifest, name: str, variant: int | None) -> str | None:
    """The format in which the file of one variant holds the non-expert `name`, or (None) the file of all together does;
    None where it does not hold it. "stored" for what is not packed."""
    sources, packed = manifest.nonexperts[name], manifest.packed_nonexperts.get(name)
    if packed is not None and packed.delta is not None:
        return packed.base if variant is None else packed.delta if variant in sources else None
    here = not any(sources) if variant is None else any(sources) and variant in sources
    if not here:
        return None
    return "stored" if packed is None else packed.base


class _VersionOnly(msgspec.Struct):
    format_version: int


class _Listed(msgspec.Struct):
    """What a manifest of any format version has, and no other manifest.json."""

    format_version: int
    polymoe_version: str
    files: list[FileRecord]


def read_manifest(folder: Path) -> Manifest:
    """Raises `BundleError` when there is none, or one that was changed or that this version cannot read."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a directory; make a bundle with `polymoe plan … --out {folder}`.")
    if not path.exists():
        parts = any((folder / name).exists() for name in ("experts", "nonexperts", "variants", TABLES))
        reason = "is an unfinished bundle (no manifest.json); plan it again" if parts else "is not a bundle"
        raise BundleError(f"{folder} {reason}.")
    if (unreadable := why_not_to_read(path, folder)) is not None:
        raise BundleError(f"{path} {unreadable}.")
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_VersionOnly).format_version
        if version not in _READABLE:
            raise BundleError(
                f"{folder} has bundle format {version}, this polymoe reads {FORMAT_VERSION}; plan it again."
            )
        manifest = msgspec.json.decode(text, type=Manifest)
        fields = msgspec.json.decode(text)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({error}); plan the bundle again.") from error
    if manifest.digest and manifest.digest != digest_of(fields):
        raise BundleError(f"{path} is damaged: it has changed since it was written; plan or copy the bundle again.")
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """As it is written, with its digest."""
    fields = msgspec.json.decode(msgspec.json.encode(manifest))
    if fields["live"] is None:
        del fields["live"]  # of most bundles
    fields["digest"] = digest_of(fields)
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def digest_of(fields: dict[str, Any]) -> str:
    """Over the fields as they stand in the file, those of later versions included."""
    return hashlib.sha256(msgspec.json.encode({k: v for k, v in fields.items() if k != "digest"})).hexdigest()


def why_not_only_a_bundle(folder: Path) -> str | None:
    """Why `folder` may hold something that is not a bundle's; None: it is one, of whatever format version, that holds
    nothing but what its manifest lists."""
    path = folder / MANIFEST
    if not path.exists() or why_not_to_read(path, folder):
        return "is not a bundle"
    try:
        files = msgspec.json.decode(path.read_bytes(), type=_Listed).files
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "is not a bundle, or one whose manifest.json is damaged"
    listed = {record.path for record in files} | {MANIFEST, UNFINISHED_MANIFEST}
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents} | set(FOLDERS) | {ADDITIONS}
    unread: list[OSError] = []
    for place, inner, names in os.walk(folder, onerror=unread.append):
        below = Path(place).relative_to(folder)
        for name in sorted(inner):
            if (below / name).as_posix() not in folders:
                return f"holds {below / name}, which is not part of the bundle"
        for name in sorted(names):
            if (below / name).as_posix() not in listed:
                return f"holds {below / name}, which is not part of the bundle"
    return f"cannot be read whole ({unread[0].filename})" if unread else None
