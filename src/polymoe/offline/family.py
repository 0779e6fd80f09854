"""Several checkpoints that can be served together: one architecture, one vocabulary, one way to compute."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from polymoe.console import Console
from polymoe.errors import FamilyError
from polymoe.model.skeleton import context_limit
from polymoe.model.trial import trace
from polymoe.offline.architecture import ArchitectureInfo
from polymoe.offline.checkpoint import Checkpoint
from polymoe.offline.scan import FamilyScan, scan_family
from polymoe.offline.vocabulary import check_vocabularies

# Config fields that do not change what the model computes at inference, or that are compared in another way.
_IGNORED_FIELDS = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "vocab_size", "tokenizer_class"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "max_position_embeddings",
    ),
    *("router_aux_loss_coef", "aux_loss_alpha", "output_router_logits", "seq_aux", "router_jitter_noise"),
    *("router_z_loss_coef", "add_router_probs"),
    *("input_jitter_noise", "initializer_range", "initializer_factor", "pretraining_tp", "problem_type", "id2label"),
    *("label2id", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("gradient_checkpointing", "unsloth_version", "unsloth_fixed", "ep_size", "expert_parallel"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNLIMITED_LENGTH = 1 << 20  # tokens; for the rare config that declares no maximum


def parse_variant_specs(specs: Sequence[str]) -> dict[str, str]:
    """["code=path", "math=org/model"] -> {"code": "path", "math": "org/model"}, in order.

    Raises `FamilyError` for a missing `=`, an empty part, a bad name or one given twice.
    """
    parsed: dict[str, str] = {}
    for text in specs:
        name, equals, spec = text.partition("=")
        if not equals or not spec:
            raise FamilyError(f"{text!r} is not NAME=PATH or NAME=org/model[@revision].")
        if name in parsed:
            raise FamilyError(f"the name {name} is given twice; every variant needs its own.")
        parsed[name] = spec
    _check_names(list(parsed))
    return parsed


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise FamilyError(
                f"{name!r} is not a variant name: 1 to 64 letters, digits, '.', '_', '-', and first a letter or digit."
            )
    folded = [name.casefold() for name in names]
    for index, name in enumerate(names):
        if folded.index(folded[index]) != index:
            # Names become folders, which some file systems do not tell apart by case.
            raise FamilyError(f"the names {names[folded.index(folded[index])]} and {name} differ only in case.")


class Family:
    """Checked variants, in the order given. `config` and `architecture` are the first variant's."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        if not checkpoints:
            raise FamilyError("a family needs at least one checkpoint.")
        self.checkpoints = tuple(checkpoints)
        self.names = tuple(checkpoint.name for checkpoint in checkpoints)
        _check_names(self.names)
        first = checkpoints[0]
        self.config = first.config
        for other in checkpoints[1:]:
            _check_same_model(first, other)
        self.vocab_sizes = tuple(int(c.config.get_text_config().vocab_size) for c in checkpoints)
        check_vocabularies(list(self.names), [c.path for c in checkpoints], list(self.vocab_sizes))
        _check_tensors(self.checkpoints)
        trace(self.config)  # what cannot be served is refused now, not when a bundle is loaded

    @classmethod
    def open(cls, specs: Mapping[str, str | Path] | Sequence[str]) -> Self:
        """Open `{name: folder or Hub model}` or `["NAME=SPEC", …]`.

        Raises `CheckpointError` for one that cannot be read, `UnsupportedModelError` for a model that cannot be served,
        `FamilyError` when they do not belong together.
        """
        named = dict(specs) if isinstance(specs, Mapping) else dict(parse_variant_specs(specs))
        _check_names(list(named))
        return cls([Checkpoint.open(spec, name) for name, spec in named.items()])

    @property
    def architecture(self) -> ArchitectureInfo:
        return self.checkpoints[0].architecture

    @property
    def vocab_size(self) -> int:
        """Rows of the largest vocabulary."""
        return max(self.vocab_sizes)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored."""
        first, info = self.checkpoints[0], self.architecture
        return sum(first.num_bytes(info.expert_tensor(0, tensor)) for tensor in info.expert_shapes) // info.num_experts

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of all variants."""
        return sum(c.num_bytes(target) for c in self.checkpoints for target in c.target_names)

    def scan(self, console: Console | None = None) -> FamilyScan:
        """Hashes and distances, in one pass over all weights; a progress bar on `console` if given."""
        return scan_family(self, console)


def max_model_len(config: Any) -> int:
    """Tokens of context a config allows; an encoder and its decoder have half of them each."""
    if config.is_encoder_decoder:
        return context_limit(config)
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return UNLIMITED_LENGTH if length is None else int(length)


def _check_same_model(first: Checkpoint, other: Checkpoint) -> None:
    """Raise `FamilyError` naming the first field in which two variants would compute differently."""

    def differ(field: str, a: object, b: object) -> FamilyError:
        return FamilyError(
            f"{first.name} and {other.name} are not one family: {field} is {_shown(a)} in {first.name} and "
            f"{_shown(b)} in {other.name}."
        )

    for field in ("model_type", "class_name"):
        a, b = getattr(first.architecture, field), getattr(other.architecture, field)
        if a != b:
            raise differ(field, a, b)
    left, right = first.config.to_dict(), other.config.to_dict()
    for field in sorted(left.keys() | right.keys()):
        ignored = field in _IGNORED_FIELDS or field.startswith("_") or "dropout" in field or field.endswith("pdrop")
        if not ignored and left.get(field) != right.get(field):
            raise differ(field, left.get(field), right.get(field))
    lengths = max_model_len(first.config), max_model_len(other.config)
    if lengths[0] != lengths[1] and not _plain_rope(left):
        # Scaled rotary tables depend on the length they were made for.
        raise differ("max_position_embeddings", *lengths)


def _plain_rope(config: dict[str, Any]) -> bool:
    """True when every rotary embedding of the config is of the default type."""
    found = config.get("rope_parameters")
    if found is None:
        return False
    # Either one set of parameters or one for each layer type.
    sets = [found] if "rope_type" in found else list(found.values())
    return all(isinstance(one, dict) and one.get("rope_type", "default") == "default" for one in sets)


def _check_tensors(checkpoints: Sequence[Checkpoint]) -> None:
    first, info = checkpoints[0], checkpoints[0].architecture
    experts = [info.expert_tensor(layer, tensor) for layer in range(info.num_layers) for tensor in info.expert_shapes]
    for other in checkpoints[1:]:
        if set(first.target_names) != set(other.target_names):
            odd = sorted(set(first.target_names) ^ set(other.target_names))
            raise FamilyError(f"{first.name} and {other.name} have different tensors: {', '.join(odd[:4])}.")
        for name in first.target_names:
            # Rows of the vocabulary may differ; the checkpoints' own check tied them to vocab_size already.
            skip = 1 if name in info.vocab_tensors else 0
            if first.shape(name)[skip:] != other.shape(name)[skip:]:
                raise FamilyError(
                    f"{name} has shape {list(first.shape(name))} in {first.name} and "
                    f"{list(other.shape(name))} in {other.name}."
                )
    # Physical experts of all variants lie in one stack a layer, which has one dtype.
    for tensor in info.expert_shapes:
        dtypes: dict[torch.dtype, str] = {}
        for checkpoint in checkpoints:
            for name in experts:
                if name.endswith(f".{tensor}"):
                    dtypes.setdefault(checkpoint.dtype(name), f"{checkpoint.name} ({name})")
        if len(dtypes) > 1:
            shown = " and ".join(f"{str(dtype).removeprefix('torch.')} in {place}" for dtype, place in dtypes.items())
            raise FamilyError(f"the experts are stored in different dtypes: {shown}; save all variants in one dtype.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
