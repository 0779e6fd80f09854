"""The kinds of models there are, decoder-only, the language part of a multimodal one, and encoder–decoder: all that is
different between them, in one place.

Whoever meets a model asks `kind_of(config)` what it needs to know instead of which kind it is. What the engine and
calibration need beside that is in `engine/kind.py` and `offline/calibrate/kind.py`.
"""

# ruff: noqa: ARG002  (a question brings what the other kind needs for its answer)

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from polymoe.model.attention.cross import attention_forward
from polymoe.model.attention.paged import AttentionLayer, polymoe_attention_forward
from polymoe.model.attention.relative_bias import replace_relative_biases
from polymoe.model.experts.layer import polymoe_experts_forward
from polymoe.model.stock.language_part import leave_out_other_inputs
from polymoe.model.stock.switch_experts import STACKED, SwitchExperts, stack_switch_experts

IMPLEMENTATION = "polymoe"  # the entry in transformers' registries
AttentionInterface.register(IMPLEMENTATION, polymoe_attention_forward)
_ENCODER_DECODER = "polymoe_encoder_decoder"
AttentionInterface.register(_ENCODER_DECODER, attention_forward)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, polymoe_experts_forward)

UNLIMITED_LENGTH = 1 << 20  # tokens; for the rare config that declares no maximum
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # tables that change with a batch's longest sequence, not one's own
_ENCODER_POSITIONS = 512  # where positions are relative and the config names no limit
_READ_IN_SOURCE = re.compile(r"""self\.config\.(\w+)|getattr\(self\.config, ["'](\w+)""")


class DecoderOnly:
    """One stack of layers reads the prompt and goes on writing; `EncoderDecoder` says where it is otherwise.

    auto, classes, head: transformers' factory, its config class -> model class, and how the classes' names end.
    parts: that a context is divided into; prompt and answer share one, or have one each.
    length_field: of the config.
    stacked: how experts that transformers does not stack are stored -> the tensor that they are stacked to.
    unties: whether transformers uses both of two tied tensors that are stored with different values.
    distils: whether `--distill` can run it.
    reads_pairs: whether its texts are pairs of an input and a target.
    pads_left: whether a batch of prompts has its padding first, since the answer goes on from their end.
    """

    auto: Any = AutoModelForCausalLM
    classes: Mapping[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING
    head: str | tuple[str, ...] = "ForCausalLM"
    parts = 1
    length_field = "max_position_embeddings"
    stacked: Mapping[str, str] = {}
    unties = True
    distils = True
    reads_pairs = False
    pads_left = True

    def build(self, config: Any, attention: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The stock model on the meta device, with polymoe's experts and the attention that is registered under the
        name `attention`; `IMPLEMENTATION` is polymoe's. `dtype`: None, the config's."""
        config._experts_implementation = IMPLEMENTATION
        options = {} if dtype is None else {"dtype": dtype}
        with torch.device("meta"):
            model = self.auto.from_config(config, attn_implementation=self.attention(config, attention), **options)
        self.prepare(model)
        model.set_experts_implementation(IMPLEMENTATION)
        return model.eval()

    def attention(self, config: Any, name: str) -> str | dict[str, str]:
        """`attn_implementation` of a model that attends by the registry's entry `name`."""
        return name

    def prepare(self, model: Any) -> None:
        """Make of a model that transformers has just built the one that is served."""

    def why_not(self, model: Any) -> str | None:
        """Why a model of this kind cannot be served; None: this says nothing against it."""
        name = type(model).__name__
        return None if name.endswith(self.head) else f"{name} is not a model that writes text token by token"

    def context_limit(self, config: Any) -> int:
        """Longest sequence, in tokens, that the configured positions cover."""
        config = config.get_text_config()
        limit = int(config.max_position_embeddings)
        rope = getattr(config, "rope_parameters", None) or {}
        for scheme in (r for r in (rope, *rope.values()) if isinstance(r, dict)):
            if scheme.get("rope_type") in LENGTH_DEPENDENT_ROPE:
                original = scheme.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                limit = min(limit, int(original or limit))
        return limit

    def declared_length(self, config: Any) -> int:
        """Tokens of context that a config declares."""
        length = getattr(config.get_text_config(), self.length_field, None)
        return UNLIMITED_LENGTH if length is None else int(length)

    def attention_layers(self, model: PreTrainedModel) -> dict[int, AttentionLayer] | None:
        """Layer -> its cache; None: a trial run finds out."""
        return None

    def fields_read(self, model: PreTrainedModel) -> set[str]:
        """Config fields that the forward pass reads, as far as a trial run does not show them."""
        return set()

    def keeps_float32(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the stock module casts this weight to float32 itself."""
        return False

    def experts_per_token(self, config: Any, num_experts: int) -> int:
        return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or num_experts)

    def in_encoder(self, expert_module: str) -> bool:
        """Whether an experts module of this path sees the encoder's tokens."""
        return False

    def trunk(self, model: Any) -> Any:
        """The part whose last hidden state the head reads."""
        return model.base_model

    def as_generated(self, model: Any) -> None:
        """Make one pass over a whole text compute what `generate`, which goes token by token, would."""


class LanguagePart(DecoderOnly):
    """Of a multimodal model for whose language part transformers has no text model of its own: the whole model's class,
    which computes as it does for text. Its config is the whole one."""

    auto = AutoModelForMultimodalLM
    classes = MODEL_FOR_MULTIMODAL_LM_MAPPING
    head = "ForConditionalGeneration", "ForCausalLM"
    distils = False

    def attention(self, config: Any, name: str) -> dict[str, str]:
        """Towers may have no choice of attention."""
        return {"": name} | {part: name if part == "text_config" else "eager" for part in config.sub_configs}

    def prepare(self, model: Any) -> None:
        leave_out_other_inputs(model)

    def trunk(self, model: Any) -> Any:
        return model.get_decoder()


class EncoderDecoder(DecoderOnly):
    """Switch Transformers: an encoder reads the prompt whole, the decoder writes. Its needs are known, so that no trial
    run looks for them."""

    auto = AutoModelForSeq2SeqLM
    classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    head = "ForConditionalGeneration"
    parts = 2
    length_field = "n_positions"
    stacked = STACKED
    unties = False
    distils = False
    reads_pairs = True
    pads_left = False

    def build(self, config: Any, attention: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        served = attention == IMPLEMENTATION
        options = {} if dtype is None else {"dtype": dtype}
        with torch.device("meta"):
            name = _ENCODER_DECODER if served else attention
            model: PreTrainedModel = self.auto.from_config(config, attn_implementation=name, **options)
            self.prepare(model)
            if served:
                replace_relative_biases(model)
        return model.eval()

    def prepare(self, model: Any) -> None:
        stack_switch_experts(model)

    def why_not(self, model: Any) -> str | None:
        if any(isinstance(module, SwitchExperts) for module in model.modules()):
            return None
        return (
            "it is an encoder-decoder model without the routed experts of Switch Transformers; of encoder-decoder "
            "models only SwitchTransformersForConditionalGeneration is served"
        )

    def context_limit(self, config: Any) -> int:
        return self.parts * int(getattr(config, self.length_field, None) or _ENCODER_POSITIONS)

    def declared_length(self, config: Any) -> int:
        return self.context_limit(config)

    def attention_layers(self, model: PreTrainedModel) -> dict[int, AttentionLayer]:
        found = {}
        for index, block in enumerate(model.decoder.block):
            attention = block.layer[0].SelfAttention
            size = attention.key_value_proj_dim
            found[index] = AttentionLayer(kv_heads=attention.n_heads, key_dim=size, value_dim=size)
        return found

    def fields_read(self, model: PreTrainedModel) -> set[str]:
        source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
        return {name for names in _READ_IN_SOURCE.findall(source) for name in names if name}

    def keeps_float32(self, model: PreTrainedModel, name: str) -> bool:
        parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        return name.endswith("router.classifier.weight") and isinstance(parent, SwitchTransformersTop1Router)

    def experts_per_token(self, config: Any, num_experts: int) -> int:
        return 1

    def in_encoder(self, expert_module: str) -> bool:
        return expert_module.startswith("encoder.")

    def trunk(self, model: Any) -> Any:
        return model.decoder

    def as_generated(self, model: Any) -> None:
        """The capacity of experts counts the tokens of one call, and `generate` feeds the decoder one."""
        for module in model.get_decoder().modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = sys.maxsize


_DECODER_ONLY, _LANGUAGE_PART, _ENCODER_AND_DECODER = DecoderOnly(), LanguagePart(), EncoderDecoder()


def kind_of(config: Any) -> DecoderOnly:
    if getattr(config, "is_encoder_decoder", False):
        return _ENCODER_AND_DECODER
    multimodal = type(config) in LanguagePart.classes and type(config) not in DecoderOnly.classes
    return _LANGUAGE_PART if multimodal else _DECODER_ONLY
