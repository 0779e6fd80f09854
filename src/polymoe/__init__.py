"""polymoe: several fully fine-tuned Mixture-of-Experts variants from one device.

from polymoe import LLM, SamplingParams
LLM("bundle").generate(["…"], SamplingParams(temperature=0), variants=["math"])
"""

import importlib
from typing import TYPE_CHECKING

from polymoe.version import __version__

if TYPE_CHECKING:
    from polymoe.config import EngineConfig
    from polymoe.errors import PolymoeError
    from polymoe.llm.async_llm import AsyncLLM
    from polymoe.llm.llm import LLM
    from polymoe.protocol.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
    from polymoe.protocol.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "PolymoeError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


_HOMES = {
    "LLM": "polymoe.llm.llm",
    "AsyncLLM": "polymoe.llm.async_llm",
    "CompletionOutput": "polymoe.protocol.request",
    "EngineConfig": "polymoe.config",
    "Logprob": "polymoe.protocol.request",
    "PolymoeError": "polymoe.errors",
    "RequestOutput": "polymoe.protocol.request",
    "SamplingParams": "polymoe.protocol.request",
    "StructuredOutputsParams": "polymoe.protocol.structured_outputs",
}


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        """Names are imported when first used, so that `polymoe --help` does not load torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'polymoe' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
