"""What a bundle says about itself: `manifest.json`, written last, so that a folder with one is whole.

manifest.json                       this
tables.safetensors                  `table` int32 [V, L, E]
experts/layer-000.safetensors       resident experts of expert layer 0: one stack [P, *shape] a tensor name
host/layer-000.safetensors          host tier of expert layer 0: `{h}.{tensor name}`, one expert's tensors each
nonexperts/shared.safetensors       tensors that are identical in all variants
nonexperts/variant.NAME.safetensors NAME's own; a tensor that some variants share is with the lowest of them
variants/NAME/                      config, generation config, tokenizer and chat template, as they came
"""

from pathlib import Path

import msgspec

from polymoe.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TABLES = "tables.safetensors"
SHARED = "nonexperts/shared.safetensors"


def resident_file(layer: int) -> str:
    return f"experts/layer-{layer:03d}.safetensors"


def host_file(layer: int) -> str:
    return f"host/layer-{layer:03d}.safetensors"


def own_file(variant: str) -> str:
    return f"nonexperts/variant.{variant}.safetensors"


def variant_folder(variant: str) -> str:
    return f"variants/{variant}"


class VariantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One served model. Hashes are SHA-256, hex."""

    name: str
    version: str  # over all that defines its answers: the weights that serve it, its configs and its tokenizer
    source: str  # as given: a folder or org/model[@revision]
    source_path: str  # absolute; only `polymoe eval` reads it, the bundle does not need it
    source_hash: str  # over the original's tensors
    max_model_len: int  # tokens
    vocab_size: int  # rows of its embeddings
    dtype: str  # of the experts as stored: "bfloat16", …
    has_tokenizer: bool


class FileRecord(msgspec.Struct, frozen=True):
    """One file of the bundle, path relative to it."""

    path: str
    size: int  # bytes
    sha256: str


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
    tied: dict[str, str]  # parameter -> the one it shares its tensor with
    resident_experts: list[int]  # physical experts of each layer's stack
    host_experts: list[int]  # of each layer's host list
    positions: dict[str, int]  # shared, separate, absent
    resident_bytes: dict[str, int]  # on the device, by kind
    host_bytes: int  # experts in the host tier
    bytes_per_expert_parameter: float  # resident expert bytes over one model's expert parameters
    files: list[FileRecord]  # all but this one


class _VersionOnly(msgspec.Struct):
    format_version: int


def read_manifest(folder: Path) -> Manifest:
    """Raises `BundleError` when there is none, or one that this version cannot read."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a directory; make a bundle with `polymoe plan … --out {folder}`.")
    if not path.exists():
        parts = any((folder / name).exists() for name in ("experts", "nonexperts", "variants", TABLES))
        reason = "is an unfinished bundle (no manifest.json); plan it again" if parts else "is not a bundle"
        raise BundleError(f"{folder} {reason}.")
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_VersionOnly).format_version
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{folder} has bundle format {version}, this polymoe reads {FORMAT_VERSION}; plan it again."
            )
        return msgspec.json.decode(text, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is damaged ({error}); plan the bundle again.") from error


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
