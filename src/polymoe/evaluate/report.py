"""`polymoe eval`: texts and checkpoints in, a table and a dictionary out."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from polymoe.bundle.manifest import Fidelity, WeightBytes
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig, format_bytes
from polymoe.console import Console, DescriptionColumn, warn
from polymoe.engine.core import EngineCore
from polymoe.errors import CheckpointError, PolymoeError, UnknownVariantError
from polymoe.evaluate.fidelity import Samples, measure, windows_of
from polymoe.evaluate.pairs import encode_pairs
from polymoe.evaluate.planned_original import changes_since_plan
from polymoe.evaluate.texts import WINDOW
from polymoe.model.stock.kind import kind_of
from polymoe.offline.calibrate.pairs import read_pairs
from polymoe.offline.calibrate.text_files import is_sampled
from polymoe.offline.calibrate.text_tokens import TextTokenizer, read_tokens
from polymoe.offline.checkpoint.place import Place
from polymoe.progress import say_stage


def run_eval(
    config: EngineConfig,
    texts: dict[str, Path],
    originals: Mapping[str, str | Path],
    window: int | None,
    limit: int | None,
    batch: int,
    console: Console,
) -> dict[str, Any]:
    """Measure the variants in `texts` and print a table.

    Args:
        texts: variant -> UTF-8 file, plain or JSON lines as `read_tokens` takes; of an encoder–decoder family with
            `{"input": …, "target": …}` on every line.
        originals: checkpoints that moved since the plan; the others are looked for where the plan read them.
        window: tokens; None: `WINDOW`. Pairs are taken whole.
        limit: windows or pairs of a variant, the first ones.

    Returns: `{"variants": {name: {...}}, "resident_bytes": {...}, "bytes_per_expert_parameter": …}`.
    Raises: `PolymoeError` for an unknown variant, a missing checkpoint or an empty text.
    """
    bundle = Bundle.open(config.bundle)
    names = [v.name for v in bundle.variants]
    for name in (*texts, *originals):
        if name not in names:
            raise UnknownVariantError(name, names)
    checkpoints = {name: _checkpoint(bundle, names.index(name), originals.get(name)) for name in texts}
    samples = {name: _samples(bundle, names.index(name), path, window, limit) for name, path in texts.items()}
    for name, spec in checkpoints.items():
        if changed := changes_since_plan(bundle, names.index(name), spec):
            warn(
                console,
                f"the original of {name} at {spec} is not the one that was planned ({', '.join(changed)} "
                f"changed): its figures compare with another model. Plan again, or give the one that was planned with "
                f"--original {name}=PATH.",
            )
    for name, path in texts.items():
        if is_sampled(path):
            console.print(f"The text for {name}, {path}, is large: pieces spread over it are measured.", soft_wrap=True)
    longest = max(found.longest for found in samples.values())
    # The whole pass of `batch` windows must fit at once.
    blocks = batch * ((longest + config.block_size - 1) // config.block_size)
    engine = EngineCore(msgspec.structs.replace(config, num_kv_blocks=blocks, max_model_len=longest))
    with window_progress(samples, console) as advance:
        results = measure(engine, checkpoints, samples, _original_dtype(config), batch, advance)
    console.print(fidelity_table(results))
    console.print(_bytes_table(bundle.resident_bytes))
    return {
        "variants": {name: vars_of(result) for name, result in results.items()},
        "resident_bytes": bundle.resident_bytes.by_kind,
        "bytes_per_expert_parameter": bundle.manifest.bytes_per_expert_parameter,
    }


def _samples(bundle: Bundle, index: int, path: Path, window: int | None, limit: int | None) -> Samples:
    """One variant's. Raises `PolymoeError` for a window or a text that does not do."""
    record, folder = bundle.variants[index], bundle.tokenizer_dir(index)
    if folder is None:
        raise PolymoeError(f"{record.name} has no tokenizer, which a text needs; add its files and plan again.")
    if (kind := kind_of(bundle.config)).reads_pairs:
        if window is not None:
            raise PolymoeError("--window cuts plain text; pairs of an encoder–decoder family are taken whole.")
        where, config = f"--text {record.name}", bundle.variant_config(index)
        return encode_pairs(where, read_pairs(where, path)[:limit], folder, config, record.max_model_len // kind.parts)
    window = WINDOW if window is None else window
    if window > record.max_model_len:
        raise PolymoeError(
            f"--window {window} is beyond the {record.max_model_len} tokens that {record.name} was configured for."
        )
    ids = read_tokens(f"--text {record.name}", [path], TextTokenizer(folder, record.name))
    windows = windows_of(ids, window, limit)
    if not windows:
        raise PolymoeError(f"the text for {record.name} ({path}) has fewer than two tokens.")
    return Samples(windows)


@contextmanager
def window_progress(samples: Mapping[str, Samples], console: Console) -> Iterator[Callable[[str, int], None]]:
    """A bar for each variant, without a terminal a line when one is done; yields `advance(variant, windows)`."""
    if not console.is_terminal:
        done, started = dict.fromkeys(samples, 0), time.monotonic()

        def say(name: str, count: int) -> None:
            nonlocal started
            done[name] += count
            if done[name] == (total := len(samples[name].windows)):
                say_stage(console, f"{name}: {total} windows", time.monotonic() - started)
                started = time.monotonic()

        yield say
        return
    with Progress(
        DescriptionColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        tasks = {name: progress.add_task(name, total=len(found.windows)) for name, found in samples.items()}
        yield lambda name, count: progress.advance(tasks[name], count)


def vars_of(result: Fidelity) -> dict[str, float]:
    """A `Fidelity` as the JSON line has it."""
    return {
        "ppl_original": result.perplexity_original,
        "ppl_served": result.perplexity_served,
        "kl": result.kl,
        "top1_agreement": result.top1,
        "tokens": result.tokens,
    }


def _original_dtype(config: EngineConfig) -> torch.dtype:
    return torch.float32 if config.dtype in ("auto", "float32") else getattr(torch, config.dtype)


def _checkpoint(bundle: Bundle, index: int, override: str | Path | None) -> str:
    record = bundle.variants[index]
    spec = str(override or record.source_path)
    try:
        return str(Place.find(spec))
    except CheckpointError as error:
        raise PolymoeError(
            f"the original of {record.name} is not at {spec} any more; say where with --original {record.name}=PATH."
        ) from error


def fidelity_table(results: dict[str, Fidelity]) -> Table:
    """The figures of each variant."""
    table = Table("variant", title="served against original")
    for column in ("ppl original", "ppl served", "KL (nats/token)", "top-1 agreement", "tokens"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.perplexity_original:.2f}",
            f"{r.perplexity_served:.2f}",
            f"{r.kl:.5f}",
            f"{r.top1:.3f}",
            f"{r.tokens:,}",
        )
    return table


def _bytes_table(resident: WeightBytes) -> Table:
    table = Table("on the device, as stored")
    table.add_column("bytes", justify="right")
    for kind, size in resident.by_kind.items():
        table.add_row(kind.replace("_", " "), format_bytes(size))
    table.add_row("total", format_bytes(resident.total))
    return table
