"""What a variant's own files say about sampling: `generation_config.json`, and the end tokens of `config.json`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymoe.errors import CheckpointError
from polymoe.offline.plain_files import read_json

GENERATION_CONFIG = "generation_config.json"
_MOST = 2**31 - 1  # what a count may be on the wire

# Fields of transformers that change which tokens come and that the engine does not know -> the value that asks for
# nothing. What only changes speed, memory or the form of `generate`'s result is not among them.
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "typical_p"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), 0),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "watermarking_config", "max_time")),
    **dict.fromkeys(("exponential_decay_length_penalty", "top_h", "dola_layers", "token_healing")),
    "encoder_repetition_penalty": 1,
}
_UNSET_MAX_LENGTH = 20  # what transformers writes where nobody chose one


@dataclass(frozen=True)
class GenerationDefaults:
    """`sampling`: field of `SamplingParams` -> value, for what a request leaves out.

    `eos_token_ids`: those of both files, within the vocabulary; the tokenizer's own end token is not among them.
    `warnings`: what was corrected or has no effect, one sentence each.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: list[int] = field(default_factory=list)
    decoder_start_token_id: int | None = None
    warnings: list[str] = field(default_factory=list)


def read_generation_defaults(folder: Path, config: Any, vocab_size: int, max_model_len: int) -> GenerationDefaults:
    """Read a variant's `folder`.

    Args:
        config: its transformers config.
        vocab_size: rows of its embeddings.
        max_model_len: tokens of context.

    A value out of range is corrected as transformers would (left out, where transformers refuses it) and warned of.
    Raises `CheckpointError` for a file that is no JSON, and for a value of the wrong type.
    """
    path = folder / GENERATION_CONFIG
    reader = _Reader(path, read_json(path) if path.exists() else {})
    sampling = reader.sampling()
    reader.warn_unsupported(max_model_len)
    ends = reader.end_tokens(folder / "config.json", config)
    outside = [token for token in ends if not 0 <= token < vocab_size]
    if outside:
        reader.warnings.append(
            f"eos_token_id {_shown(outside)} is outside the vocabulary of {vocab_size} rows and ends nothing."
        )
    return GenerationDefaults(
        sampling=sampling,
        eos_token_ids=[token for token in ends if token not in outside],
        decoder_start_token_id=reader.decoder_start(config),
        warnings=reader.warnings,
    )


class _Reader:
    """One generation config: checks types, corrects ranges, collects warnings."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self.warnings: list[str] = []

    def sampling(self) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def take(name: str, value: float | int | None, own: str | None = None) -> None:
            if value is not None:
                found[own or name] = value

        take("temperature", self._within("temperature", 0.0, 100.0))
        top_p = self._within("top_p", 0.0, 1.0)
        if top_p == 0.0:  # transformers keeps one token
            found["top_k"] = 1
        else:
            take("top_p", top_p)
            take("top_k", self._top_k())
        take("min_p", self._within("min_p", 0.0, 1.0, high_clamps=False))
        penalty = self._within("repetition_penalty", 0.0, 100.0)
        if penalty == 0.0:
            self._warn("repetition_penalty", penalty)
        else:
            take("repetition_penalty", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            take(name, self._within(name, -2.0, 2.0, low_clamps=True))
        take("max_new_tokens", self._count("max_new_tokens", 1), "max_tokens")
        take("min_new_tokens", self._count("min_new_tokens", 0), "min_tokens")
        if stops := self._stop_strings():
            found["stop"] = stops
        if self._typed("do_sample", bool, "true or false") is False:
            found["temperature"] = 0.0
        return found

    def warn_unsupported(self, max_model_len: int) -> None:
        for name, neutral in _UNSUPPORTED.items():
            value = self.values.get(name)
            if value not in (None, False, neutral, [], {}):
                self.warnings.append(f"{self.path.name}: {name} {_shown(value)} is not supported and has no effect.")
        longest = self.values.get("max_length")
        if isinstance(longest, int) and longest != _UNSET_MAX_LENGTH and longest < max_model_len:
            self.warnings.append(
                f"{self.path.name}: max_length {longest} is not supported and has no effect; max_new_tokens is."
            )

    def end_tokens(self, config_file: Path, config: Any) -> list[int]:
        """Of both files. Only where neither names any, what the config's class says by itself, as `generate` does."""
        stored = read_json(config_file) if config_file.exists() else {}
        found = self._token_ids(self.path, self.values.get("eos_token_id"))
        for section in (stored, stored.get("text_config")):
            if isinstance(section, dict):
                found += self._token_ids(config_file, section.get("eos_token_id"))
        if not found and "eos_token_id" not in self.values | stored:
            found = self._token_ids(config_file, getattr(config, "eos_token_id", None))
        return list(dict.fromkeys(found))

    def decoder_start(self, config: Any) -> int | None:
        """The token that a decoder starts with, as `generate` chooses it; None for a decoder-only model."""
        if not config.is_encoder_decoder:
            return None
        own = self._typed("decoder_start_token_id", int, "a token id")
        for found in (own, getattr(config, "decoder_start_token_id", None)):
            if found is not None:
                return int(found)
        raise CheckpointError(
            f"{self.path.parent / 'config.json'}: an encoder–decoder model needs decoder_start_token_id."
        )

    def _token_ids(self, file: Path, value: Any) -> list[int]:
        """`eos_token_id` is one id or a list of them. −1 is how some models say that they have none."""
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is(token, int) for token in ids):
            raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, not {_shown(value)}.")
        return [token for token in ids if token != -1]

    def _typed(self, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        if value is not None and not _is(value, kind):
            raise CheckpointError(f"{self.path}: {name} must be {wanted}, not {_shown(value)}.")
        return value

    def _within(
        self, name: str, low: float, high: float, *, low_clamps: bool = False, high_clamps: bool = True
    ) -> float | None:
        """A number in [low, high]: what is beyond an end that clamps becomes that end, anything else is left out."""
        value = self._typed(name, (int, float), "a number")
        if value is None or low <= value <= high:
            return None if value is None else float(value)
        instead = None
        if value > high and high_clamps:
            instead = high
        elif value < low and low_clamps:
            instead = low
        self._warn(name, value, instead)
        return instead

    def _top_k(self) -> int | None:
        value = self._typed("top_k", (int, float), "a whole number")
        if value is None or value == -1:  # vLLM's way to say all tokens
            return None
        if value < 0 or math.isnan(value):
            self._warn("top_k", value)
            return None
        return self._whole("top_k", value)

    def _count(self, name: str, least: int) -> int | None:
        value = self._typed(name, (int, float), "a whole number")
        if value is None:
            return None
        if math.isnan(value) or value < least:
            self._warn(name, value)
            return None
        return self._whole(name, value)

    def _whole(self, name: str, value: float) -> int:
        if value > _MOST:
            self._warn(name, value, _MOST)
            return _MOST
        if value != int(value):
            raise CheckpointError(f"{self.path}: {name} must be a whole number, not {_shown(value)}.")
        return int(value)

    def _stop_strings(self) -> list[str]:
        value = self.values.get("stop_strings")
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise CheckpointError(f"{self.path}: stop_strings must be a text or a list of them, not {_shown(value)}.")
        return [stop for stop in stops if stop]

    def _warn(self, name: str, value: object, instead: float | None = None) -> None:
        used = "it is left out" if instead is None else f"{instead:g} is used"
        self.warnings.append(f"{self.path.name}: {name} {_shown(value)} is out of range; {used}.")


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """JSON's true is no number, though Python's is."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
