"""polymoe: several fully fine-tuned Mixture-of-Experts variants from one device.

from polymoe import LLM, SamplingParams
LLM("bundle").generate(["…"], SamplingParams(temperature=0), variants=["math"])
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polymoe.config import EngineConfig
    from polymoe.engine.async_llm import AsyncLLM
    from polymoe.engine.llm import LLM
    from polymoe.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
    from polymoe.errors import PolymoeError

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "PolymoeError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

__version__ = version("polymoe")

_HOMES = {
    "LLM": "polymoe.engine.llm",
    "AsyncLLM": "polymoe.engine.async_llm",
    "CompletionOutput": "polymoe.engine.request",
    "EngineConfig": "polymoe.config",
    "Logprob": "polymoe.engine.request",
    "PolymoeError": "polymoe.errors",
    "RequestOutput": "polymoe.engine.request",
    "SamplingParams": "polymoe.engine.request",
}


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        """Names are imported when first used, so that `polymoe --help` does not load torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'polymoe' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
