"""Where a checkpoint comes from: a folder, or a model of the Hugging Face Hub; and which files of it are read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from polymoe.bundle.config_checks import CONFIG, fields, is_number
from polymoe.bundle.plain_files import read_json, why_not_to_read
from polymoe.bundle.tensor_file import TensorEntry, read_header
from polymoe.config import format_bytes
from polymoe.errors import CheckpointError, UnsupportedModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# Some repositories hold a second copy of the weights in a folder (`original/`, `metal/`).
_NO_DOWNLOAD = ["*/*.safetensors", "*/*.json"]
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")
_EXPERTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?experts")
_MANY_LAYERS, _MANY_EXPERTS = 256, 4096  # up to here a model that does not fit its weights is built in seconds
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What a variant's folder in a bundle gets besides the weights.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def resolve(spec: str | Path) -> Path:
    """The folder of a checkpoint: `spec` itself when it is one, else the local copy of `org/model[@revision]`.

    Raises `CheckpointError` when it is neither, or cannot be downloaded.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{spec} is a file; give the folder that holds config.json and model.safetensors.")
    if not _HUB_ID.fullmatch(str(spec)):
        raise CheckpointError(
            f"{spec} is not a directory. Give a checkpoint folder or a Hub model, org/model[@revision]."
        )
    return _download(str(spec))


def _download(spec: str) -> Path:
    import huggingface_hub  # here, since most runs never need it

    repo, _, revision = spec.partition("@")

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=_DOWNLOAD,
                ignore_patterns=_NO_DOWNLOAD,
                local_files_only=local_files_only,
            )
        )

    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            # Some versions of the client ask the network for a revision given as a commit even when told not to.
            return snapshot(local_files_only=True)
        return snapshot(local_files_only=False)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{spec} is not a directory here and cannot be downloaded from the Hugging Face Hub ({first_line})"
        ) from error


class Stored(NamedTuple):
    """What lies in a checkpoint's files. `tensors`: stored name -> (file, entry). `notes`: what a user should know."""

    tensors: dict[str, tuple[Path, TensorEntry]]
    notes: tuple[str, ...]


def read_stored(folder: Path) -> Stored:
    """Every tensor that transformers would read of `folder`. Headers are validated, no data is read.

    `model.safetensors` wins over `model.safetensors.index.json`, as in transformers. Of a tensor that lies in two
    shards the one that the index names is read. Raises `CheckpointError`.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        tensors = {name: (single, entry) for name, entry in read_header(single).items()}
        return Stored(
            tensors, _left_out(folder, {single.name}, "model.safetensors is read alone, as transformers does")
        )
    if not index.exists():
        raise CheckpointError(_why_no_weights(folder))

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again or save the model again.")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not a plain file name.")
        if not (folder / file).exists():
            raise CheckpointError(f"{index} names {file}, which is missing; download it again.")
        headers[file] = read_header(folder / file)
    notes: list[str] = []
    tensors, holders = {}, _holders(headers)
    for name, files in holders.items():
        # A tensor that the index does not name is read too: transformers reads whole shards, in this order.
        file = weight_map.get(name, files[-1])
        if file not in files:
            notes.append(f"{index.name} says that {file} holds {name}; it is read from {files[-1]}, which does")
            file = files[-1]
        elif len(files) > 1:
            stale = ", ".join(f for f in files if f != file)
            beware = f"; transformers itself takes the copy in {files[-1]}" if file != files[-1] else ""
            notes.append(f"{name} is stored again in {stale}; the copy in {file} is read, as {index.name} says{beware}")
        tensors[name] = (folder / file, headers[file][name])
    if missing := sorted(set(weight_map) - set(holders)):
        name = missing[0]
        raise CheckpointError(
            f"{index} says that {weight_map[name]} holds {name}, but it does not; download both again."
            + (f" {len(missing) - 1} more are missing." if len(missing) > 1 else "")
        )
    return Stored(tensors, (*_shortened(notes), *_left_out(folder, set(headers), f"{index.name} names other files")))


def _holders(headers: dict[str, dict[str, TensorEntry]]) -> dict[str, list[str]]:
    """Tensor name -> the shards that hold it, in order."""
    found: dict[str, list[str]] = {}
    for file, entries in headers.items():
        for name in entries:
            found.setdefault(name, []).append(file)
    return found


def _left_out(folder: Path, read: set[str], reason: str) -> tuple[str, ...]:
    """A note on the safetensors files that nothing reads."""
    extra = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read)
    if not extra:
        return ()
    size = format_bytes(sum((folder / file).stat().st_size for file in extra))
    return (f"{reason}; left out: {some(extra)} ({size})",)


def _shortened(notes: list[str]) -> list[str]:
    return notes if len(notes) <= 4 else [*notes[:3], f"and {len(notes) - 3} more such tensors"]


def some(names: Sequence[str], most: int = 4) -> str:
    """["a", …] -> "a, b, c, d and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_counts(folder: Path) -> None:
    """Compare large numbers of layers and experts in config.json with the weights, before such a model is built.

    Raises `UnsupportedModelError`, and what `read_stored` does.
    """
    raw = read_json(folder / CONFIG)
    layers = {k: v for k, v in fields(raw) if _LAYERS.fullmatch(k) and is_number(v) and v > _MANY_LAYERS}
    experts = {k: v for k, v in fields(raw) if _EXPERTS.fullmatch(k) and is_number(v) and v > _MANY_EXPERTS}
    if not layers and not experts:
        return
    stored = read_stored(folder).tensors
    numbered = _most_numbered(stored)
    widest = max((size for _, entry in stored.values() for size in entry.shape), default=0)
    for what, counts, most in (("layers", layers, numbered), ("experts", experts, max(numbered, widest))):
        for key, value in counts.items():
            if value > most:
                raise UnsupportedModelError(
                    f"{folder / CONFIG}: {key} is {value}, but the weights have room for {most} {what} at most. Is "
                    "this the config of another checkpoint?"
                )


def _most_numbered(names: Mapping[str, object]) -> int:
    """The most different numbers that stand at one place of the names: of `layers.0.…`, `layers.1.…` two."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for index, part in enumerate(parts):
            if part.isdecimal():
                found.setdefault(".".join(parts[:index]), set()).add(part)
    return max(map(len, found.values()), default=0)


def check_files(folder: Path) -> None:
    """Raise `CheckpointError` for a file that would be read and must not be: a link out of the checkpoint (and the
    Hub's cache), a FIFO, a device."""
    for path in sorted({path for pattern in (*SIDE_FILES, *_WEIGHTS) for path in folder.glob(pattern)}):
        if not path.is_dir() and (reason := why_not_to_read(path, folder)):
            raise CheckpointError(f"{path} {reason}.")


def _why_no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter (LoRA), not a full checkpoint; give it with its base, NAME=BASE+ADAPTER."
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        return (
            f"{folder} has only pickle weights, which can run code when loaded; convert them to safetensors "
            "(load the model with transformers and call save_pretrained)."
        )
    return f"{folder} has no model.safetensors and no model.safetensors.index.json."


def side_files(folder: Path) -> list[Path]:
    """Config, tokenizer, chat template and generation config files of a checkpoint, relative to it, sorted."""
    found = {path.relative_to(folder) for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".py")
