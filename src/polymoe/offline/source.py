"""Where a checkpoint comes from: a folder, or a model of the Hugging Face Hub; and which files of it are read."""

import json
import re
from pathlib import Path
from typing import Any

from polymoe.errors import CheckpointError
from polymoe.offline.tensorfile import TensorEntry, read_header

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# Some repositories hold a second copy of the weights in a folder (`original/`, `metal/`).
_NO_DOWNLOAD = ["*/*.safetensors", "*/*.json"]
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises `CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, this is a {type(value).__name__}.")
    return value


def refuse_remote_code(folder: Path) -> None:
    """Raise `CheckpointError` when a config asks for Python code from the checkpoint (`auto_map`)."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and read_json(folder / name).get("auto_map"):
            raise CheckpointError(
                f"{folder / name} asks for custom code (auto_map); polymoe never runs code from a checkpoint. "
                "If transformers has this model itself, remove the auto_map entry."
            )


def read_stored(folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Every tensor stored in `folder`: stored name -> (file, entry). Headers are validated, no data is read.

    `model.safetensors` wins over `model.safetensors.index.json`, as in transformers. Raises `CheckpointError`.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {name: (single, entry) for name, entry in read_header(single).items()}
    if not index.exists():
        raise CheckpointError(_why_no_weights(folder))

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map.")
    files = sorted({str(file) for file in weight_map.values()})
    stored: dict[str, tuple[Path, TensorEntry]] = {}
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not a plain file name.")
        path = folder / file
        if not path.exists():
            raise CheckpointError(f"{index} names {file}, which is missing; download it again.")
        for name, entry in read_header(path).items():
            if name in stored:
                raise CheckpointError(f"{folder}: tensor {name} is stored twice, in {stored[name][0].name} and {file}.")
            stored[name] = (path, entry)
    for name, file in weight_map.items():
        if name not in stored or stored[name][0].name != file:
            raise CheckpointError(f"{index} says that {file} holds {name}, but it does not; download both again.")
    return stored


def _why_no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter (LoRA), not a full checkpoint; merge it into its base model and save that."
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
