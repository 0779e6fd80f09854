"""`polymoe eval`: texts and checkpoints in, a table and a dictionary out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from polymoe.config import EngineConfig, format_bytes
from polymoe.engine.engine import EngineCore
from polymoe.engine.output import OutputProcessor
from polymoe.errors import PolymoeError, UnknownVariantError
from polymoe.evaluate.fidelity import Fidelity, measure, windows_of
from polymoe.offline.bundle import Bundle


def run_eval(
    config: EngineConfig,
    texts: dict[str, Path],
    originals: dict[str, Path],
    window: int,
    limit: int | None,
    batch: int,
    console: Console,
) -> dict[str, Any]:
    """Measure the variants in `texts` and print a table.

    Args:
        originals: checkpoints that moved since the plan; the others are looked for where the plan read them.

    Returns: `{"variants": {name: {...}}, "resident_bytes": {...}, "bytes_per_expert_parameter": …}`.
    Raises: `PolymoeError` for an unknown variant, a missing checkpoint or an empty text.
    """
    bundle = Bundle.open(config.bundle)
    names = [v.name for v in bundle.variants]
    for name in (*texts, *originals):
        if name not in names:
            raise UnknownVariantError(name, names)
    checkpoints = {name: _checkpoint(bundle, names.index(name), originals.get(name)) for name in texts}
    longest = max(bundle.variant_config(names.index(n)).max_position_embeddings for n in texts)
    if window > longest:
        raise PolymoeError(f"--window {window} is beyond the {longest} tokens that the variants were configured for.")
    # The whole pass of `batch` windows must fit at once.
    blocks = batch * ((window + config.block_size - 1) // config.block_size)
    engine = EngineCore(msgspec.structs.replace(config, num_kv_blocks=blocks))
    processor = OutputProcessor(engine.info)
    windows = {}
    for name, path in texts.items():
        tokenizer = processor.require_tokenizer(name, "a text")
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
        windows[name] = windows_of(ids, window, limit)
        if not windows[name]:
            raise PolymoeError(f"the text for {name} ({path}) has fewer than two tokens.")
    with window_progress(windows, console) as advance:
        results = measure(engine, checkpoints, windows, _original_dtype(config), batch, advance)
    console.print(fidelity_table(results))
    console.print(_bytes_table(bundle.resident_bytes))
    return {
        "variants": {name: vars_of(result) for name, result in results.items()},
        "resident_bytes": bundle.resident_bytes,
        "bytes_per_expert_parameter": bundle.manifest.bytes_per_expert_parameter,
    }


@contextmanager
def window_progress(windows: dict[str, list[list[int]]], console: Console) -> Iterator[Callable[[str, int], None]]:
    """A bar for each variant; yields `advance(variant, windows)`."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        tasks = {name: progress.add_task(name, total=len(found)) for name, found in windows.items()}
        yield lambda name, count: progress.advance(tasks[name], count)


def vars_of(result: Fidelity) -> dict[str, float]:
    """A `Fidelity` as the JSON line has it."""
    return {
        "ppl_original": result.ppl_original,
        "ppl_served": result.ppl_served,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "tokens": result.tokens,
    }


def _original_dtype(config: EngineConfig) -> torch.dtype:
    return torch.float32 if config.dtype in ("auto", "float32") else getattr(torch, config.dtype)


def _checkpoint(bundle: Bundle, index: int, override: Path | None) -> Path:
    record = bundle.variants[index]
    path = override or Path(record.source_path)
    if not path.is_dir():
        raise PolymoeError(
            f"the original of {record.name} is not at {path} any more; say where with --original {record.name}=PATH."
        )
    return path


def fidelity_table(results: dict[str, Fidelity]) -> Table:
    """The figures of each variant."""
    table = Table("variant", title="served against original")
    for column in ("ppl original", "ppl served", "KL (nats/token)", "top-1 agreement", "tokens"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.ppl_original:.2f}",
            f"{r.ppl_served:.2f}",
            f"{r.kl:.5f}",
            f"{r.top1_agreement:.3f}",
            f"{r.tokens:,}",
        )
    return table


def _bytes_table(resident: dict[str, int]) -> Table:
    table = Table("on the device, as stored")
    table.add_column("bytes", justify="right")
    for kind, size in resident.items():
        table.add_row(kind.replace("_", " "), format_bytes(size))
    table.add_row("total", format_bytes(sum(resident.values())))
    return table
