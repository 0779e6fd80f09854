"""Compile what the GPU kernels' wrappers launch for a compute capability, without a GPU; prints a JSON list.

`python tests/gpu_compile.py 90 [all]`. Run by test_gpu_compile.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool
from polymoe.kernels.gpu.combine import combine_rows
from polymoe.kernels.gpu.expert_gemm import GATED, WEIGHTED, expert_gemm
from polymoe.kernels.gpu.paged_attention import paged_attention
from polymoe.kernels.gpu.pool_matrix import PoolMatrix, exact_matrix, packed_matrix, stored_matrix
from polymoe.kernels.gpu.segmented_linear import segmented_linear
from polymoe.kernels.gpu.token_sort import SortedRows, sort_rows
from polymoe.quant.formats import get_format, parts

WIDTH, INNER, BF16 = 2048, 768, torch.bfloat16


class NoDriver:
    """Stands for a GPU of one compute capability, as far as compiling asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_only(capability: int) -> list[dict[str, Any]]:
    """From now on launches compile and do nothing else; returns the list that they add to."""
    driver.set_active(NoDriver(capability))
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.__name__}"
        found.append({"name": name, "shared": kernel.metadata.shared, "bytes": len(kernel.asm["cubin"])})

    JITFunction.run = compile_it
    return found


def matrix(name: str | None, outputs: int, inputs: int) -> PoolMatrix | None:
    if name is None:
        return None
    if name == "stored":
        return stored_matrix(torch.empty(1, outputs, inputs, dtype=BF16), torch.empty(1, outputs, dtype=BF16))
    if name == "exact":
        bits, starts = torch.zeros(1, outputs, inputs // 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        entry = {"bitmap": bits, "values": torch.empty(16, dtype=BF16), "starts": starts}
        return exact_matrix(ExactPool({"w": entry}), "w", inputs, 0, BF16)
    fmt = get_format(name)
    tensors = {part: torch.empty(s, dtype=d) for part, (d, s) in parts(fmt, (1, outputs, inputs), BF16).items()}
    return packed_matrix(PackedPool(fmt, {"w": tensors}, {"w": (outputs, inputs)}), "w", 0, BF16)


def experts(base: str | None, delta: str | None, block_m: int, *, down: bool = False) -> None:
    rows = torch.zeros(128, dtype=torch.int32)
    place = SortedRows(rows, rows, rows, rows, rows, rows, rows, top_k=2, block_m=block_m)
    if down:
        x, out = torch.empty(128, INNER, dtype=BF16), torch.empty(128, WIDTH)
        pair = matrix(base, WIDTH, INNER), matrix(delta, WIDTH, INNER)
        expert_gemm(WEIGHTED.value, x, place, *pair, out, torch.empty(64, 2), add=base is None)
    else:
        x, out = torch.empty(64, WIDTH, dtype=BF16), torch.empty(128, INNER, dtype=BF16)
        expert_gemm(
            GATED.value, x, place, matrix(base, 2 * INNER, WIDTH), matrix(delta, 2 * INNER, WIDTH), out
        )  # fmt: skip


def attention(heads: tuple[int, int], dim: int, max_query_len: int, **options: Any) -> None:
    tokens = 8 * max_query_len
    cache = torch.empty(64, 16, heads[1], dim, dtype=BF16)
    paged_attention(
        torch.empty(tokens, heads[0], dim, dtype=BF16), cache, cache, torch.zeros(8, 256, dtype=torch.int32),
        torch.zeros(9, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), max_query_len=max_query_len,
        scaling=dim**-0.5, **options,
    )  # fmt: skip


def main() -> None:
    found = compile_only(int(sys.argv[1]))
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        print(json.dumps(found))
        return
    experts("stored", None, 16)
    experts("stored", "exact", 16)
    experts("int4", "d2", 16)
    experts("fp8", "d3", 128)
    experts("int5", "d4", 16, down=True)
    runs = torch.zeros(5, dtype=torch.int32)
    segmented_linear(torch.empty(4, WIDTH, dtype=BF16), torch.empty(2, 512, WIDTH, dtype=BF16), None, runs[:4], runs)
    attention((8, 1), 128, 1)  # few enough programs that keys are split
    attention((32, 8), 128, 64, window=128, softcap=30.0, sinks=torch.zeros(32))
    tables = torch.zeros(4, 8, dtype=torch.int32)
    for tokens, top_k in ((1, 1), (128, 2), (256, 2)):
        variant = torch.zeros(tokens, dtype=torch.int64)
        sort_rows(torch.zeros(tokens, top_k, dtype=torch.int64), variant, tables, tables, None, 16, 32)
    combine_rows(torch.empty(128, WIDTH), 2, BF16)
    if sys.argv[2:] == ["all"]:
        for base, delta in (("stored", "d1"), ("int8", "d5"), ("int6", "d2"), ("int3", None), (None, "d3")):
            for block_m in (16, 32, 64, 128):
                experts(base, delta, block_m, down=True)
        for block_m in (32, 64, 128):
            experts("stored", "exact", block_m, down=True)
        for dim, max_query_len in ((64, 1), (128, 1), (256, 1), (192, 64), (256, 64)):
            attention((16, 2), dim, max_query_len)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
