"""What a config.json may not say, found out before transformers acts on it: requests for code, and values that would
only fail when a request comes."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polymoe.bundle.plain_files import read_json
from polymoe.errors import CheckpointError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# With another value transformers takes it for a repository of the Hub (`org/name[@revision]`) and loads its code.
_IMPLEMENTATION = re.compile(r"_*(attn|attention|experts)_implementation(_internal)?")
_STOCK = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", *(f"flash_attention_{i}" for i in (2, 3, 4)))
OTHER_INPUTS = ("vision_config", "audio_config", "image_config", "video_config", "speech_config", "talker_config")
_AT_LEAST_1 = ("max_position_embeddings", "n_positions", "num_experts_per_tok")
_MOST = 1 << 31
_TOKEN_ID = re.compile(r"\w*_token_id")


def load_config(folder: Path) -> Any:
    """The transformers config in `folder`, which says nothing of an attention or experts implementation: polymoe has
    its own. Of a multimodal model it is that of its language model, where transformers has a text model for it.

    Raises `CheckpointError` for what `check_config` refuses, and anything that transformers raises.
    """
    from transformers import AutoConfig  # here: it takes seconds

    check_config(folder)
    config = text_part(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    config._attn_implementation = config._experts_implementation = None  # of its sub-configs too
    return config


def text_part(config: Any) -> Any:
    """The config of the text model inside a multimodal one; any other `config` as it is.

    Where transformers has no text model for the language part by itself it is that of the whole model, of which only
    the language part is used. `left_out_inputs` of the result names the configs of the parts that are left out
    (`vision_config`, …).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    whole = config
    config = getattr(whole, "thinker_config", None) or whole  # the part of an omni model that writes text
    other = [name for name in OTHER_INPUTS if any(getattr(c, name, None) is not None for c in (config, whole))]
    text = config.get_text_config()
    if not other or text is config:
        return whole
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = text
    elif type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return whole
    for name in ("dtype", "quantization_config", "architectures"):
        if getattr(config, name, None) is None and getattr(whole, name, None) is not None:
            setattr(config, name, getattr(whole, name))
    config.left_out_inputs = other
    return config


def check_config(folder: Path) -> None:
    """Raise `CheckpointError` for a config that asks for code or has values that no model can have."""
    raw = read_json(folder / CONFIG)
    refuse_remote_code(folder)
    _check_values(folder / CONFIG, raw)
    if (folder / GENERATION_CONFIG).exists():
        _check_values(folder / GENERATION_CONFIG, read_json(folder / GENERATION_CONFIG))


def refuse_remote_code(folder: Path) -> None:
    """Raise `CheckpointError` when a config asks for code of the checkpoint or of the Hub: `auto_map`, or an attention
    or experts implementation that transformers does not have itself, at any depth."""
    for name in (CONFIG, "tokenizer_config.json"):
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        for key, value in fields(read_json(path)):
            if key == "auto_map" and value:
                raise CheckpointError(
                    f"{path} asks for custom code (auto_map); polymoe never runs code from a checkpoint. "
                    "If transformers has this model itself, remove the auto_map entry."
                )
            if _IMPLEMENTATION.fullmatch(key) and not _is_stock(value):
                raise CheckpointError(
                    f"{path} asks for custom code ({key}: {_shown(value)}); polymoe never runs code from the Hub and "
                    f"has its own attention and experts. Remove the {key} entry."
                )


def _is_stock(value: Any) -> bool:
    if isinstance(value, dict):  # one for each sub-config
        return all(_is_stock(item) for item in value.values())
    return value is None or (isinstance(value, str) and value.removeprefix("paged|") in _STOCK)


def fields(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every JSON object inside `value`."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from item.items()
            left += item.values()
        elif isinstance(item, list):
            left += item


def _check_values(path: Path, raw: Mapping[str, Any]) -> None:
    for key, value in fields(raw):
        if value is None:
            continue
        if key in _AT_LEAST_1 and not (_is_int(value) and 0 < value < _MOST):
            raise CheckpointError(f"{path}: {key} is {_shown(value)}; it must be a whole number from 1 to {_MOST - 1}.")
        if _TOKEN_ID.fullmatch(key):
            several = isinstance(value, list) and key == "eos_token_id"
            if not all(_is_int(item) for item in (value if several else [value])):
                what = "a token id or a list of them" if key == "eos_token_id" else "a token id"
                raise CheckpointError(f"{path}: {key} is {_shown(value)}; it must be {what} (whole numbers), or null.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
