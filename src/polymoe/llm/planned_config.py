"""What an `LLM` is given -> the configuration of its engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.errors import ConfigError
from polymoe.native.installed import say_if_missing

Source = str | Path | Mapping[str, str | Path]  # a bundle, or {variant name: checkpoint}


def planned_config(bundle: Source, policy: str, memory: str | None, options: Mapping[str, Any]) -> EngineConfig:
    """Checkpoints are planned now, or were before; progress is shown on standard error. A package without compiled
    kernels says so.

    Args: `options`: fields of `EngineConfig`.

    Raises `ConfigError` for options that do not exist or do not go together, and what planning raises.
    """
    say_if_missing()
    if memory is not None and not isinstance(memory, str):
        raise ConfigError(f'memory must be a text such as "1.0x" or "24GiB", got {memory!r}.')
    if isinstance(bundle, Mapping):
        for name, path in bundle.items():
            if not isinstance(name, str) or not isinstance(path, str | Path):
                raise ConfigError(f"checkpoints are {{name: path, …}}, got {name!r}: {path!r}.")
        config = EngineConfig.of("", options)
        from polymoe.offline.cache import planned_bundle  # here, since bundles that exist do not need it

        path = planned_bundle(
            bundle, policy, memory, device=config.device, reserved=config.cache_bytes, console=Console(stderr=True)
        )
        return msgspec.structs.replace(config, bundle=str(path))
    if memory is not None or policy != "auto":
        raise ConfigError(f"{bundle} is planned already; policy and memory are for checkpoints, {{name: path, …}}.")
    return EngineConfig.of(bundle, options)
