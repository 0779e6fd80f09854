"""How far llama.cpp's copies in few bits are from the checkpoints: so that speed is compared at equal fidelity.

    python benchmarks/compare/fidelity.py                                       the demo family and its texts
    python benchmarks/compare/fidelity.py NAME=PATH … --text NAME=FILE …

Windows, originals (transformers, float32) and figures are those of `polymoe eval`; llama.cpp's logits come from its own
kernels, so the rounding of activations that they do is in the figures. A type that a tensor's rows are too short for
(Q4_K: 256 values) is replaced by llama.cpp with one of more bits: the file's size says so.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy
import torch
from rich.table import Table

from llama import TYPES, environment, gguf_copy, install_llama
from polymoe.bundle.manifest import Fidelity
from polymoe.config import format_bytes
from polymoe.console import print_error
from polymoe.demo import family_paths, text_paths
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import OriginalModel, compare
from polymoe.evaluate.texts import WINDOW, samples_of
from polymoe.machine import available_cores
from polymoe.offline.checkpoint.family import parse_variant_specs
from polymoe.offline.plan.options import pairs
from run import ROOT, console
from workers import Worker, WorkerError


def measure(
    checkpoints: Mapping[str, Path], texts: Mapping[str, Path], worker: Path, scratch: Path
) -> dict[str, dict[str, tuple[Fidelity, int]]]:
    """Type -> variant -> its fidelity and the bytes of its file. Checkpoints are linked into `scratch`, where the
    copies are made."""
    found: dict[str, dict[str, tuple[Fidelity, int]]] = {kind: {} for kind in TYPES}
    for name, samples in samples_of(checkpoints, texts).items():
        link = scratch / name
        link.symlink_to(checkpoints[name].resolve())
        original = OriginalModel(checkpoints[name], torch.float32, torch.device("cpu"))
        vocabulary: int = original.model.config.vocab_size
        for kind in TYPES:
            copy = gguf_copy(link, kind, worker)
            scorer = Worker([str(worker)], environment(worker, available_cores()), scratch / "llama.log")
            try:
                scorer.send(models=[str(copy)], options={"max_model_len": WINDOW, "max_num_seqs": 1})
                scorer.answer(timeout=900)
                scored = partial(_logits, scorer, scratch / "logits")
                result = compare(samples.windows, original.numbered_logits(None), scored, vocabulary, 8)
            finally:
                scorer.stop()
            found[kind][name] = (result, copy.stat().st_size)
            console.print(f"{kind}, {name}: KL {result.kl:.5f}", highlight=False)
    return found


def _logits(scorer: Worker, file: Path, _first: int, windows: list[list[int]]) -> list[torch.Tensor]:
    """float32 `[tokens, vocabulary]` for each window, through `file`."""
    rows = []
    for window in windows:
        scorer.send(tokens=window, logits=str(file))
        size = int(scorer.answer(timeout=300)["vocab"])
        rows.append(torch.from_numpy(numpy.fromfile(file, dtype=numpy.float32).reshape(len(window), size)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="NAME=PATH", help="checkpoints; default: the demo family")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="held-out text; repeatable")
    parser.add_argument("--llama", type=Path, default=ROOT / ".llama.cpp", help="llama.cpp's folder")
    arguments = parser.parse_args()
    try:
        specs = arguments.specs
        checkpoints = {n: Path(p) for n, p in parse_variant_specs(specs).items()} if specs else family_paths()
        texts = pairs(arguments.text, "--text") or ({} if specs else text_paths())
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(checkpoints, texts, install_llama(arguments.llama), Path(scratch))
    except (PolymoeError, WorkerError) as error:
        print_error(console, error)
        return 1
    table = Table("llama.cpp copies", "KL mean", "worst", "top-1", "bytes of all variants")
    for kind, variants in found.items():
        kl = [fidelity.kl for fidelity, _ in variants.values()]
        top1 = statistics.mean(fidelity.top1 for fidelity, _ in variants.values())
        size = sum(size for _, size in variants.values())
        table.add_row(kind, f"{statistics.mean(kl):.5f}", f"{max(kl):.5f}", f"{top1:.4f}", format_bytes(size))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
