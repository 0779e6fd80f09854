"""What serving needs of a variant besides its weights, tried when it is planned: generation config, tokenizer, chat
template. What would fail later, at the start of a server or in every request, is refused now."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from polymoe.bundle.generation_defaults import GENERATION_CONFIG, GenerationDefaults, read_generation_defaults
from polymoe.bundle.plain_files import read_json
from polymoe.console import Console, warn
from polymoe.errors import BundleError, CheckpointError, PolymoeError
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family, max_model_len
from polymoe.offline.checkpoint.source import TOKENIZER_FILES, side_files
from polymoe.text.template_trial import try_template

if TYPE_CHECKING:
    from polymoe.text.tokenizer import VariantTokenizer

# They are read by libraries whose messages do not name them.
_JSON_OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def check_serving(family: Family, console: Console | None = None) -> None:
    """Warnings go to `console`, each once. Raises `CheckpointError` that names variant and file."""
    for checkpoint, vocab_size in zip(family.checkpoints, family.vocab_sizes, strict=True):
        try:
            warnings = check_variant(checkpoint, vocab_size)
        except PolymoeError as error:
            raise CheckpointError(f"{checkpoint.name}: {error}") from error
        for warning in warnings if console is not None else ():
            assert console is not None
            warn(console, warning)


def check_variant(checkpoint: Checkpoint, vocab_size: int) -> list[str]:
    """Returns warnings, which name the variant. Raises `PolymoeError` that names the file."""
    from polymoe.protocol.request import sampling_params

    folder = checkpoint.path
    defaults = read_generation_defaults(folder, checkpoint.config, vocab_size, max_model_len(checkpoint.config))
    try:
        sampling_params(defaults.sampling, {})
    except PolymoeError as error:
        raise CheckpointError(f"{folder / GENERATION_CONFIG}: {error}") from error
    name = checkpoint.name
    found = [f"{name}: {warning}" for warning in defaults.warnings]
    if not any(Path(file) in side_files(folder) for file in TOKENIZER_FILES):
        return [*found, f"{name} has no tokenizer; only token ids can be sent to it."]
    return found + [f"{name}: {warning}" for warning in _check_tokenizer(folder, vocab_size, defaults)]


def _check_tokenizer(folder: Path, vocab_size: int, defaults: GenerationDefaults) -> list[str]:
    from polymoe.text.tokenizer import VariantTokenizer  # loads transformers' tokenizers

    files = side_files(folder)
    present = [name for name in TOKENIZER_FILES if Path(name) in files]
    for name in _JSON_OBJECTS:
        if Path(name) in files:
            read_json(folder / name)
    for file in (folder / file for file in files if file.suffix == ".jinja"):
        try:
            file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: not readable as UTF-8 text ({error}).") from error
    with tempfile.TemporaryDirectory(prefix="polymoe-") as temporary:
        for file in files:  # what the bundle will hold, and nothing else of the checkpoint
            link = Path(temporary) / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / file).resolve())
        try:
            tokenizer = VariantTokenizer(temporary)
            tokenizer.decode(tokenizer.encode("Hello"))
        except Exception as error:
            raise CheckpointError(_why_no_tokenizer(folder, present, error)) from error
    return _check_template(folder, vocab_size, tokenizer) + _check_ids(vocab_size, tokenizer, defaults)


def _why_no_tokenizer(folder: Path, present: list[str], error: Exception) -> str:
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    fix = "save it again, or remove the tokenizer's files to serve the variant with token ids only"
    if present[0] in _SENTENCEPIECE:
        fix = (
            "install the package sentencepiece, or load it with transformers where that is installed and save it again "
            "as tokenizer.json"
        )
    return f"{folder / present[0]}: the tokenizer cannot be loaded ({reason}); {fix}."


def _check_template(folder: Path, vocab_size: int, tokenizer: "VariantTokenizer") -> list[str]:
    where, fix = _template_file(folder), "repair it, or remove it to serve plain completions only."
    if tokenizer.chat_template_fault is not None:
        raise CheckpointError(f"{where}: the chat template cannot be used ({tokenizer.chat_template_fault}); {fix}")
    if tokenizer.template_source is None:
        return []
    try:
        text, warning = try_template(tokenizer.template_source)
    except BundleError as error:
        raise CheckpointError(f"{where}: the chat template fails ({error}); {fix}") from error
    beyond = [token for token in tokenizer.encode(text, add_special_tokens=False) if token >= vocab_size]
    if beyond:
        raise CheckpointError(
            f"{where}: the chat template writes {tokenizer.token_text(beyond[0])!r}, which is token {beyond[0]} and "
            f"outside the vocabulary of {vocab_size} rows; {fix}"
        )
    return [] if warning is None else [warning]


def _template_file(folder: Path) -> Path:
    """Where a checkpoint's chat template is."""
    names = ("chat_template.jinja", "chat_template.json")
    return next((folder / name for name in names if (folder / name).exists()), folder / "tokenizer_config.json")


def _check_ids(vocab_size: int, tokenizer: "VariantTokenizer", defaults: GenerationDefaults) -> list[str]:
    warnings = []
    if (last := tokenizer.largest_token_id) >= vocab_size:
        warnings.append(
            f"its tokenizer has tokens up to {last}, its embeddings {vocab_size} rows: text with one of the tokens "
            "beyond is refused."
        )
    end = tokenizer.eos_token_id
    if end is not None and end >= vocab_size:
        warnings.append(f"its tokenizer's eos_token is token {end}, outside the vocabulary, and ends nothing.")
    if not defaults.eos_token_ids and (end is None or end >= vocab_size):
        warnings.append("it has no end token: only max_tokens and stop strings end its answers.")
    return warnings
