"""What the engine needs of each kind of model (`polymoe.model.stock.kind`)."""

from dataclasses import dataclass
from typing import Any

from polymoe.engine.encoder_decoder_runner import EncoderDecoderRunner
from polymoe.engine.model_runner import ModelRunner
from polymoe.errors import ConfigError
from polymoe.model.backends.base import Backend
from polymoe.model.encoder_decoder import EncoderDecoderModel
from polymoe.model.served_model import ServedModel
from polymoe.model.stock.kind import DecoderOnly, EncoderDecoder, LanguagePart, kind_of


@dataclass(frozen=True)
class EngineKind:
    """model, runner: what serves it. keeps_prefixes: whether a prompt's first blocks depend on nothing after them.
    pads_steps: whether a backend may pad its steps, as a GPU's does."""

    model: type[ServedModel]
    runner: type[ModelRunner]
    keeps_prefixes: bool
    pads_steps: bool

    def check(self, backend: Backend) -> None:
        """Raises `ConfigError` for a backend that does not serve this kind."""
        if backend.pads_steps and not self.pads_steps:
            raise ConfigError("encoder–decoder models are served on a CPU only; use --device cpu.")


_DECODER = EngineKind(ServedModel, ModelRunner, keeps_prefixes=True, pads_steps=True)
_KINDS = {
    DecoderOnly: _DECODER,
    LanguagePart: _DECODER,
    EncoderDecoder: EngineKind(EncoderDecoderModel, EncoderDecoderRunner, keeps_prefixes=False, pads_steps=False),
}


def engine_kind(config: Any) -> EngineKind:
    return _KINDS[type(kind_of(config))]
