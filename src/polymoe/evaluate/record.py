"""The measurement that ends a plan: what each variant lost, written into the bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from polymoe.bundle.fidelity import record_fidelity
from polymoe.bundle.manifest import Fidelity
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.engine.core import EngineCore
from polymoe.evaluate.fidelity import Samples, measure
from polymoe.evaluate.report import fidelity_table, window_progress

_BATCH = 8  # windows a pass


def measure_and_record(
    bundle: Bundle,
    checkpoints: Mapping[str, str | Path],
    texts: Mapping[str, Path],
    samples: Mapping[str, Samples],
    console: Console,
) -> dict[str, Fidelity]:
    """Measure a bundle in float32 on the CPU against its checkpoints, print a table and keep the figures in it.

    Args:
        checkpoints: variant -> its original, as `OriginalModel` takes it.
        texts: variant -> the file that its samples come from; its name is kept with the figures.
        samples: variant -> what it is measured on.
    """
    options = float32_options(max(found.longest for found in samples.values()))
    engine = EngineCore(EngineConfig(bundle=str(bundle.path), **options))
    with window_progress(samples, console) as advance:
        results = measure(engine, dict(checkpoints), dict(samples), torch.float32, _BATCH, advance)
    console.print(fidelity_table(results))
    named = {name: msgspec.structs.replace(found, text=str(texts[name])) for name, found in results.items()}
    record_fidelity(bundle.path, named)
    return named


def float32_options(window: int, batch: int = _BATCH) -> dict[str, Any]:
    """Of an engine that takes `batch` windows of `window` tokens in one pass and rounds nothing beyond the plan."""
    block = 16
    return {
        "device": "cpu", "dtype": "float32", "block_size": block, "enable_prefix_caching": False,
        "max_num_seqs": batch, "max_model_len": window, "num_kv_blocks": batch * ((window + block - 1) // block),
    }  # fmt: skip
