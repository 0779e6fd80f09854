"""polymoe: several fully fine-tuned Mixture-of-Experts variants from one device.

from polymoe import LLM, SamplingParams
LLM("bundle").generate(["…"], SamplingParams(temperature=0), variants=["math"])
"""

import importlib
from importlib.metadata import version
from typing import Any

__all__ = [
    "LLM",
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
    "CompletionOutput": "polymoe.engine.request",
    "EngineConfig": "polymoe.config",
    "Logprob": "polymoe.engine.request",
    "PolymoeError": "polymoe.errors",
    "RequestOutput": "polymoe.engine.request",
    "SamplingParams": "polymoe.engine.request",
}


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `polymoe --help` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'polymoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
