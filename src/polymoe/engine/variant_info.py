"""What clients may know of a variant, from its bundle."""

from pathlib import Path
from typing import Any

from polymoe.engine.info import VariantInfo
from polymoe.errors import ConfigError
from polymoe.offline.bundle import Bundle
from polymoe.offline.source import read_json


def variant_info(bundle: Bundle, index: int, max_model_len: int) -> VariantInfo:
    """`max_model_len`: tokens, as the engine decided."""
    record = bundle.variants[index]
    folder = bundle.tokenizer_dir(index)
    generation = _generation_config(bundle.variant_folder(index))
    eos = generation.get("eos_token_id", bundle.variant_config(index).eos_token_id)
    defaults = {k: generation[k] for k in ("temperature", "top_p", "top_k", "min_p") if generation.get(k) is not None}
    return VariantInfo(
        name=record.name,
        version=record.version,
        max_model_len=max_model_len,
        vocab_size=record.vocab_size,
        root=record.source,
        created=int(Path(bundle.path).stat().st_mtime),
        tokenizer_dir=None if folder is None else str(folder),
        eos_token_ids=[] if eos is None else list(eos) if isinstance(eos, list) else [int(eos)],
        generation=defaults if generation.get("do_sample", bool(defaults)) else {},
        predicted_damage=record.predicted_damage,
        fidelity=record.fidelity,
        decoder_start_token_id=_decoder_start(bundle.variant_config(index), generation),
    )


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _decoder_start(config: Any, generation: dict[str, Any]) -> int | None:
    """The token that a decoder starts with, as `generate` chooses it; None for a decoder-only model."""
    if not config.is_encoder_decoder:
        return None
    for found in (generation.get("decoder_start_token_id"), getattr(config, "decoder_start_token_id", None)):
        if found is not None:
            return int(found)
    raise ConfigError("an encoder–decoder model needs decoder_start_token_id in its config.json.")
