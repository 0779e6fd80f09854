"""What clients may know of a variant, from its bundle."""

from pathlib import Path

from polymoe.bundle.addition import AddedFiles
from polymoe.bundle.generation_defaults import GenerationDefaults, read_generation_defaults
from polymoe.bundle.reader import Bundle
from polymoe.errors import ConfigError, PolymoeError
from polymoe.model.stock.skeleton import context_limit
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.request import sampling_params


def variant_info(bundle: Bundle, index: int, max_model_len: int) -> VariantInfo:
    """`max_model_len`: tokens, as the engine decided. What makes a variant unusable is a fact about it, not an error:
    the others are served."""
    record = bundle.variants[index]
    folder = bundle.tokenizer_dir(index)
    defaults, fault = GenerationDefaults(), bundle.faults.get(record.name)
    if fault is None:
        try:
            config = bundle.variant_config(index)
            defaults = read_generation_defaults(
                bundle.variant_folder(index), config, record.vocab_size, record.max_model_len
            )
            sampling_params(defaults.sampling, {})
        except PolymoeError as error:
            fault = str(error)
    return VariantInfo(
        name=record.name,
        version=record.version,
        max_model_len=max_model_len,
        vocab_size=record.vocab_size,
        root=record.source,
        created=int(Path(bundle.path).stat().st_mtime),
        tokenizer_dir=None if folder is None else str(folder),
        eos_token_ids=defaults.eos_token_ids,
        generation=defaults.sampling,
        predicted_error=record.predicted_error,
        fidelity=record.fidelity,
        decoder_start_token_id=defaults.decoder_start_token_id,
        place=index,
        fault=fault,
    )


def added_info(files: AddedFiles, max_model_len: int, place: int) -> VariantInfo:
    """Of a version that was added while the bundle was served. Raises `PolymoeError` for one that cannot be used."""
    added, folder = files.addition, files.variant_folder
    defaults = read_generation_defaults(folder, files.config, added.vocab_size, added.max_model_len)
    sampling_params(defaults.sampling, {})
    return VariantInfo(
        name=added.name,
        version=added.version,
        max_model_len=max_model_len,
        vocab_size=added.vocab_size,
        root=added.source,
        created=added.created,
        tokenizer_dir=str(folder) if added.has_tokenizer else None,
        eos_token_ids=defaults.eos_token_ids,
        generation=defaults.sampling,
        decoder_start_token_id=defaults.decoder_start_token_id,
        place=place,
    )


def max_model_len(bundle: Bundle, index: int, asked: int | None) -> int:
    """Tokens that a variant's sequences may have: what it was configured for, or less where `asked`. Raises
    `ConfigError` for more."""
    record = bundle.variants[index]
    unreadable = record.name in bundle.faults
    limit = record.max_model_len if unreadable else context_limit(bundle.variant_config(index))
    if asked is not None and asked > limit:
        raise ConfigError(
            f"max_model_len {asked} is beyond the {limit} tokens that variant {record.name} was configured for."
        )
    return asked or limit
