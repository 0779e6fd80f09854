"""Does a bundle's folder hold what its manifest says? Everything that is cheap is compared at every start: names, kinds
and sizes of all files, hashes of the small ones, headers of the tensor files, ids in the tables."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from polymoe.bundle.live import ADDITIONS
from polymoe.bundle.manifest import (
    SHARED,
    TABLES,
    FileRecord,
    Manifest,
    delta_file,
    host_file,
    nonexpert_format,
    own_file,
    packed_name,
    resident_file,
    variant_folder,
)
from polymoe.bundle.plain_files import why_not_to_read
from polymoe.bundle.tensor_file import TensorEntry, dtype_name, read_header
from polymoe.errors import BundleError, CheckpointError
from polymoe.quant.formats import EXACT, STORED, get_format

FIX = "plan it again or copy it again"
_HASH_STEP = 8 << 20
_FLOATS = {"F32", "BF16", "F16", "F64"}

# What a tensor must be: the names of the dtypes that do (empty: any), its shape (None: any), each size of it (−1: any)
Wanted = tuple[set[str], tuple[int, ...] | None]


def is_weights(path: str) -> bool:
    """Whether a file of a bundle is too large to be hashed at every start."""
    if path.startswith(f"{ADDITIONS}/"):
        return path.endswith(".safetensors")
    return path.startswith(("experts/", "deltas/", "host/", "nonexperts/"))


def file_sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """SHA-256, hex; None when `stopped` said so before the end."""
    digest, buffer = hashlib.sha256(), bytearray(_HASH_STEP)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stopped():
                return None
            digest.update(view[:count])
    return digest.hexdigest()


def file_damage(folder: Path, record: FileRecord, with_hash: bool) -> str | None:
    """What is wrong with one file, to follow its path; None: nothing. Without its hash nothing of it is read."""
    path = folder / record.path
    if not path.exists() and not path.is_symlink():
        return "is missing"
    if reason := why_not_to_read(path, folder):
        return reason
    try:
        if (size := path.stat().st_size) != record.size:
            return f"has {size} bytes, not {record.size}"
        if with_hash and file_sha256(path) != record.sha256:
            return "has changed"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def damaged(folder: Path, path: str, reason: str) -> BundleError:
    return BundleError(f"{folder} is damaged: {path} {reason}; {FIX}.")


def damages(folder: Path, manifest: Manifest, verify: bool) -> Iterator[tuple[str | None, BundleError]]:
    """Files that are not what the manifest says: (the variant that alone needs it, or None; the error).

    Without `verify` weights are not hashed.
    """
    owners = {variant_folder(variant.name): variant.name for variant in manifest.variants}
    for record in manifest.files:
        if reason := file_damage(folder, record, verify or not is_weights(record.path)):
            owner = None if is_weights(record.path) else owners.get("/".join(record.path.split("/")[:2]))
            yield owner, damaged(folder, record.path, reason)
    listed = {record.path for record in manifest.files}
    for own, variant in owners.items():
        # transformers reads what it finds there.
        for path in sorted((folder / own).rglob("[!.]*")):
            name = path.relative_to(folder).as_posix()
            if name not in listed and not path.is_dir():
                yield variant, damaged(folder, name, "was added (manifest.json does not list it)")


def check_headers(folder: Path, manifest: Manifest) -> None:
    """Raise `BundleError` for a tensor file whose header is damaged, or that lacks a tensor or has one of another dtype
    or shape than planned, or one too many."""
    rows: dict[str, dict[str, tuple[int, ...]]] = {}  # non-expert -> file -> shape
    for record in manifest.files:
        if not record.path.endswith(".safetensors") or record.path.startswith(f"{ADDITIONS}/"):
            continue  # those are read by `polymoe.bundle.addition`
        try:
            entries = read_header(folder / record.path, FIX)
        except CheckpointError as error:
            raise BundleError(str(error)) from error
        wanted = _wanted(manifest, record.path)
        for name in sorted(wanted.keys() | entries.keys()):
            if name not in entries:
                if name not in ("delta", "sign"):  # the tables that not every bundle has
                    raise damaged(folder, record.path, f"does not hold {name}")
            elif name not in wanted:
                raise damaged(folder, record.path, f"holds {name}, which is not planned")
            elif not _fits(entries[name], wanted[name]):
                found = f"{entries[name].dtype_name} {list(entries[name].shape)}"
                raise damaged(folder, record.path, f"has {name} as {found}, which is not as planned")
            elif name in manifest.nonexperts:
                rows.setdefault(name, {})[record.path] = entries[name].shape
    sizes = {own_file(variant.name): variant.vocab_size for variant in manifest.variants}
    for name, shapes in rows.items():
        first = next(iter(shapes.values()))
        for file, shape in shapes.items():
            # Of a variant with a smaller vocabulary the embeddings have fewer rows.
            if shape != first and (shape[1:] != first[1:] or not shape or shape[0] != sizes[file]):
                raise damaged(folder, file, f"has {name} as {list(shape)}, another variant as {list(first)}")


def _fits(entry: TensorEntry, wanted: Wanted) -> bool:
    dtypes, shape = wanted
    if dtypes and entry.dtype_name not in dtypes:
        return False
    return shape is None or (
        len(shape) == len(entry.shape) and all(b in (a, -1) for a, b in zip(entry.shape, shape, strict=True))
    )


def _wanted(manifest: Manifest, path: str) -> dict[str, Wanted]:
    """Tensor name -> what it must be, of one tensor file."""
    layers = range(len(manifest.expert_modules))
    if path == TABLES:
        shape = (len(manifest.variants), len(layers), manifest.num_experts)
        return {"table": ({"I32"}, shape), "delta": ({"I32"}, shape), "sign": ({"I8"}, shape)}
    if path == SHARED:
        return _nonexperts(manifest, None)
    for index, variant in enumerate(manifest.variants):
        if path == own_file(variant.name):
            return _nonexperts(manifest, index)
    for layer in layers:
        if path == resident_file(layer):
            count = manifest.base_pools[layer].get(STORED.name, 0)
            stored = {n: (_FLOATS, (count, *shape)) for n, shape in manifest.expert_shapes.items()}
            packed = {n: c for n, c in manifest.base_pools[layer].items() if get_format(n).is_packed}
            return stored | _packed(manifest, packed)
        if path == delta_file(layer):
            return _packed(manifest, manifest.delta_pools[layer])
        if path == host_file(layer):
            return {
                f"{index}.{name}": (_FLOATS, tuple(shape))
                for index in range(manifest.host_experts[layer])
                for name, shape in manifest.expert_shapes.items()
            }
    raise AssertionError(f"{path} is no tensor file of a bundle")


def _nonexperts(manifest: Manifest, variant: int | None) -> dict[str, Wanted]:
    """Of the file of one variant, or of all together."""
    wanted: dict[str, Wanted] = {}
    for name in manifest.nonexperts:
        fmt = nonexpert_format(manifest, name, variant)
        if fmt is None:
            continue
        if (packed := manifest.packed_nonexperts.get(name)) is None:
            wanted[name] = set(), None
            continue
        for part, (dtype, shape) in get_format(fmt).parts(tuple(packed.shape), torch.float32).items():
            wanted[packed_name(fmt, name, part)] = {dtype_name(dtype)}, shape
    return wanted


def _packed(manifest: Manifest, pools: dict[str, int]) -> dict[str, Wanted]:
    """The tensors of packed pools; see `polymoe.quant.format.Format.pool_parts`."""
    wanted: dict[str, Wanted] = {}
    flip = -1 if manifest.transposed else 1
    for name, count in pools.items():
        for tensor, stored in manifest.expert_shapes.items():
            for part, (dtype, size) in get_format(name).pool_parts(count, tuple(stored[::flip])).items():
                wanted[packed_name(name, tensor, part)] = _FLOATS if dtype is None else {dtype_name(dtype)}, size
    return wanted


def check_ids(path: Path, manifest: Manifest, table: Tensor, delta: Tensor | None, sign: Tensor | None) -> None:
    """Raise `BundleError`, naming `path`, for an id of an expert or a delta that does not exist. Tables [V, L, E]."""

    def check(wrong: Tensor, what: str) -> None:
        if bool(wrong.any()):
            v, layer, expert = wrong.nonzero()[0].tolist()
            raise BundleError(
                f"{path} is damaged: {what} for variant {manifest.variants[v].name}, layer {layer}, expert {expert}; "
                f"{FIX}."
            )

    def by_layer(counts: list[int]) -> Tensor:
        return torch.tensor(counts)[None, :, None]

    check(table >= by_layer(manifest.resident_experts), "it names a resident expert that does not exist")
    check(-1 - table.long() >= by_layer(manifest.host_experts), "it names a host expert that does not exist")
    if delta is None:
        if any(manifest.delta_pools):
            raise BundleError(f"{path} is damaged: it has no table of the deltas; {FIX}.")
        return
    deltas = [sum(pools.values()) for pools in manifest.delta_pools]
    exact = [pools.get(EXACT.name, 0) for pools in manifest.delta_pools]  # the last of a layer
    stored = [pools.get(STORED.name, 0) for pools in manifest.base_pools]
    check((delta < -1) | (delta >= by_layer(deltas)), "it names a delta that does not exist")
    check((delta >= 0) & (table < 0), "it has a delta on a host expert")
    is_exact = (delta >= 0) & (delta >= by_layer(deltas) - by_layer(exact))
    check(is_exact & (table >= by_layer(stored)), "it has an exact delta on a packed expert")
    if sign is not None:
        check((sign != 1) & (sign != -1), "it has a sign other than 1 and -1")
