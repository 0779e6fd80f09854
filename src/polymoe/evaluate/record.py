"""The measurement that ends a plan: what each variant lost, written into the bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.engine.engine import EngineCore
from polymoe.evaluate.fidelity import Fidelity, Samples, measure
from polymoe.evaluate.report import fidelity_table, window_progress
from polymoe.offline import manifest
from polymoe.offline.bundle import Bundle, record_fidelity

_BATCH = 8  # windows a pass


def measure_and_record(
    bundle: Bundle,
    checkpoints: Mapping[str, Path],
    texts: Mapping[str, Path],
    samples: Mapping[str, Samples],
    console: Console,
) -> dict[str, Fidelity]:
    """Measure a bundle in float32 on the CPU against its checkpoints, print a table and keep the figures in it.

    Args:
        checkpoints: variant -> folder of its original.
        texts: variant -> the file that its samples come from; its name is kept with the figures.
        samples: variant -> what it is measured on.
    """
    options = float32_options(max(found.longest for found in samples.values()))
    engine = EngineCore(EngineConfig(bundle=str(bundle.path), **options))
    with window_progress(samples, console) as advance:
        results = measure(engine, dict(checkpoints), dict(samples), torch.float32, _BATCH, advance)
    console.print(fidelity_table(results))
    record_fidelity(
        bundle.path,
        {
            name: manifest.Fidelity(
                text=str(texts[name]),
                tokens=found.tokens,
                kl=found.kl,
                top1=found.top1_agreement,
                perplexity_original=found.ppl_original,
                perplexity_served=found.ppl_served,
            )
            for name, found in results.items()
        },
    )
    return results


def float32_options(window: int, batch: int = _BATCH) -> dict[str, Any]:
    """Of an engine that takes `batch` windows of `window` tokens in one pass and rounds nothing beyond the plan."""
    block = 16
    return {
        "device": "cpu", "dtype": "float32", "block_size": block, "enable_prefix_caching": False,
        "max_num_seqs": batch, "max_model_len": window, "num_kv_blocks": batch * ((window + block - 1) // block),
    }  # fmt: skip
