"""Do the configs of two variants mean one model? What the stock model computes is compared, not the JSON."""

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from polymoe.errors import FamilyError, UnsupportedModelError
from polymoe.model.stock.kind import LENGTH_DEPENDENT_ROPE, kind_of
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.computation import Computation, plain_rope

# Config fields that do not change what the model computes at inference, or that are compared in another way.
_IGNORED_FIELDS = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "vocab_size", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "n_positions"),
    *("router_aux_loss_coef", "aux_loss_alpha", "output_router_logits", "seq_aux", "router_jitter_noise"),
    *("router_z_loss_coef", "add_router_probs"),
    *("input_jitter_noise", "initializer_range", "initializer_factor", "pretraining_tp", "problem_type", "id2label"),
    *("label2id", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("left_out_inputs", "gradient_checkpointing", "unsloth_version", "unsloth_fixed", "ep_size", "expert_parallel"),
}
_ONE_VALUE = "If both were trained with the same value, write it into both config.json"


def max_model_len(config: Any) -> int:
    """Tokens of context a config allows; an encoder and its decoder have half of them each."""
    return kind_of(config).declared_length(config)


@dataclass(frozen=True)
class _Field:
    """One field of a config or of a config inside it. `path`: "head_dim" or "text_config.head_dim"."""

    path: str
    value: Any

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def _fields(config: Any, prefix: str = "") -> Iterator[_Field]:
    """The effective values: as the config class leaves them, not as config.json spells them."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield _Field(prefix + name, value)


def _differing(first: Any, other: Any) -> list[_Field]:
    """The fields of `other` that have another value than in `first` and may matter, by path."""
    mine = {field.path: field.value for field in _fields(first)}
    theirs = {field.path: field.value for field in _fields(other)}
    found = [_Field(path, theirs.get(path)) for path in sorted(mine.keys() | theirs.keys())]
    return [f for f in found if not _ignored(f.name) and _plain(mine.get(f.path)) != _plain(f.value)]


def _ignored(name: str) -> bool:
    return name in _IGNORED_FIELDS or "dropout" in name or name.endswith("pdrop")


def _plain(value: Any) -> Any:
    """Values that are equal whatever tuple, list or empty entry spells them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in plain_rope(value).items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _with(config: Any, changes: Sequence[_Field], length: int | None = None) -> Any:
    """A copy of `config` with the values of `changes`, and with `length` tokens of context if one is given."""
    config = copy.deepcopy(config)
    for change in changes:
        owner = _get(config, change.path.rpartition(".")[0]) if "." in change.path else config
        if owner is None:  # a config inside the config that only the other has
            raise UnsupportedModelError(f"there is no {change.path}")
        setattr(owner, change.name, copy.deepcopy(change.value))
    text = config.get_text_config()
    if length is not None and getattr(text, "max_position_embeddings", None) is not None:
        text.max_position_embeddings = length
    return config


def check_same_model(first: Checkpoint, other: Checkpoint) -> None:
    """Raise `FamilyError` naming the first field in which two variants would compute differently."""
    for name in ("model_type", "class_name"):
        a, b = getattr(first.architecture, name), getattr(other.architecture, name)
        if a != b:
            raise _differ(first, other, name, a, b, "Only fine-tunes of one model can share its experts")
    lengths = max_model_len(first.config), max_model_len(other.config)
    changes = _differing(first.config, other.config)
    if changes:
        _check_computation(first, other, changes, max(lengths))
    if lengths[0] == lengths[1]:
        return
    kind = kind_of(first.config)
    if kind.parts > 1:
        raise _differ(first, other, kind.length_field, lengths[0] // kind.parts, lengths[1] // kind.parts, _ONE_VALUE)
    if not _same_tables(first.config, lengths):
        way_out = f"Its rotary tables depend on the length. {_ONE_VALUE}"
        raise _differ(first, other, kind.length_field, lengths[0], lengths[1], way_out)


def _check_computation(first: Checkpoint, other: Checkpoint, changes: list[_Field], length: int) -> None:
    mine = Computation.of(_with(first.config, [], length))

    def matter(some: list[_Field]) -> bool:
        try:
            theirs = Computation.of(_with(first.config, some, length))
        except (UnsupportedModelError, AttributeError, ValueError):  # not a model with these values
            return True
        return mine.differs(theirs, {change.name for change in some})

    if matter(changes):
        field = next((change for change in changes if matter([change])), changes[0])
        a, b = _get(first.config, field.path), field.value
        raise _differ(first, other, field.path, a, b, _ONE_VALUE)


def _same_tables(config: Any, lengths: tuple[int, int]) -> bool:
    """Whether two lengths of context give the same rotary tables. Scaled ones can depend on the length."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)]
    if any(kind in LENGTH_DEPENDENT_ROPE for kind in kinds):  # values at the start say too little
        return False
    a, b = (Computation.of(_with(config, [], length)) for length in lengths)
    return a.same_tables(b)


def _differ(first: Checkpoint, other: Checkpoint, field: str, a: object, b: object, way_out: str) -> FamilyError:
    return FamilyError(
        f"{first.name} and {other.name} are not one family: {field} is {_shown(a)} in {first.name} and {_shown(b)} in "
        f"{other.name} ({first.path / 'config.json'}, {other.path / 'config.json'}). {way_out}; else plan them as "
        "families of their own."
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def unknown_keys(checkpoint: Checkpoint) -> list[str]:
    """Keys of config.json, by path, that its config class does not know and the stock model's source does not name."""
    source = inspect.getsource(inspect.getmodule(type(checkpoint.model)))  # type: ignore[arg-type]
    names = {path: path.rpartition(".")[2] for path in _unknown(checkpoint.config)}
    return sorted(
        p for p, name in names.items() if not _ignored(name) and not re.search(rf"\b{re.escape(name)}\b", source)
    )


def _unknown(config: Any, prefix: str = "") -> Iterator[str]:
    known = {field.name for field in fields(config)}
    try:
        known |= vars(type(config)()).keys()  # what the class adds itself
    except Exception:  # a class without defaults; it has no fields but its own
        known |= vars(config).keys()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _unknown(value, f"{prefix}{name}.")
        elif name not in known and not name.startswith("_") and not hasattr(type(config), name):
            yield prefix + name
