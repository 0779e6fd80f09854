"""The kernels at slower levels than the processor's fastest: which is chosen, and some of each kernel's tests there.

`make test-levels` runs all of them at every level, `make emulate-arm` their comparisons in C++ for another processor.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hatch_build
import test_cpu_kernels
import test_encode
import test_grouped_linear
import test_packed_experts
import test_packed_linear
import test_packed_nonexperts
import test_paged_attention
import test_rms_norm
import test_tiled_experts
from polymoe.kernels.cpu import tiles as tiles_module
from polymoe.kernels.cpu.tiles import can_multiply_tiles
from polymoe.native import installed
from polymoe.native.library import cpu_kernels, instruction_set

SLOWER = installed.processor_levels()[1:]

at_each_level = pytest.mark.usefixtures("level")


@pytest.fixture(params=SLOWER or [""])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not request.param:
        pytest.skip("this processor has no slower level")
    monkeypatch.delenv("POLYMOE_KERNELS", raising=False)
    monkeypatch.setenv("POLYMOE_CPU_LEVEL", request.param)
    if installed.obstacle():
        pytest.skip("the CPU kernels are not built or cannot run here")
    for cached in (cpu_kernels, can_multiply_tiles):
        cached.cache_clear()
    try:
        assert cpu_kernels() is not None, installed.obstacle()
        yield request.param
    finally:
        for cached in (cpu_kernels, can_multiply_tiles):
            cached.cache_clear()


def test_the_level_is_the_one_that_was_asked_for(level: str) -> None:
    assert installed.level() == level
    assert "AVX2" in instruction_set() or "NEON" in instruction_set()
    assert can_multiply_tiles()


@at_each_level
@pytest.mark.parametrize(
    ("base", "delta"),
    [("stored", "none"), ("int4", "d2"), ("fp8", "d5"), ("int8", "d1"), ("int6", "none"), ("stored", "exact")],
)  # fmt: skip
def test_experts_that_are_not_in_tiles(base: str, delta: str) -> None:
    test_packed_experts.test_against_the_reference(base, delta, *test_packed_experts.SIZES[1])


@at_each_level
def test_pools_and_absent_experts() -> None:
    test_packed_experts.test_pools_and_absent_experts_in_one_batch()


@at_each_level
@pytest.mark.parametrize("tokens", [1, 17, 120])
@pytest.mark.parametrize(
    ("bases", "deltas"),
    [(["int3"], ["d1"]), (["int4", "int6"], ["d1", "d3"]), (["int5"], ["d5"]), (["int8", "fp8"], ["d4"])],
)  # fmt: skip
def test_experts_in_tiles(bases: list[str], deltas: list[str], tokens: int) -> None:
    test_tiled_experts.test_as_the_reference(bases, deltas, tokens, "zipf")


@at_each_level
@pytest.mark.parametrize("way", [("int4", "d2"), ("int8", "none")])
@pytest.mark.parametrize("counts", [[5], [1, 30, 2]])
def test_non_experts_in_tiles(way: tuple[str, str], counts: list[int]) -> None:
    test_packed_nonexperts.test_products_of_tiles(way, counts, whole=True)


@at_each_level
def test_lossless_deltas_beside_tiles() -> None:
    test_tiled_experts.test_lossless_deltas_beside_tiles()


@at_each_level
@pytest.mark.parametrize(("base", "delta", "size"), [("int5", "d4", 0), ("int3", "none", 1), ("stored", "exact", 2)])
def test_float32_and_odd_sizes(base: str, delta: str, size: int) -> None:
    test_packed_linear.test_every_format_in_float32_and_in_odd_sizes(base, delta, *test_packed_linear.ODD[size])


@at_each_level
@pytest.mark.parametrize("counts", [[1], [0, 5, 0, 3], [30, 1, 1]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_stored_weights(counts: list[int], with_bias: bool) -> None:
    test_grouped_linear.test_against_float32(counts, 96, 33, with_bias, torch.bfloat16)
    test_grouped_linear.test_the_kernel_rounds_to_nearest_and_keeps_nan()


@at_each_level
def test_norms() -> None:
    test_rms_norm.test_the_kernel_matches_the_formula(40, 64, 8)


@at_each_level
@pytest.mark.parametrize("window", [None, 7])
def test_attention(window: int | None) -> None:
    test_paged_attention.test_against_float64([16, 1, 17, 33, 5], 6, 2, 96, 48, window)
    test_paged_attention.test_a_bias_and_a_later_start()
    test_paged_attention.test_very_large_and_equal_scores()


@at_each_level
@pytest.mark.parametrize("name", ["int8", "int5", "int3", "d1", "d2"])
def test_encoding(name: str) -> None:
    for shape in ((5, 192), (4, 1000), (3, 33)):
        test_encode.test_as_torch_encodes(name, shape)


@at_each_level
def test_the_number_of_threads_changes_nothing() -> None:
    test_cpu_kernels.test_the_number_of_threads_changes_nothing(3)


def test_what_is_compiled_is_what_is_looked_for() -> None:
    """The build names the same levels, and each library's name leads back to its level."""
    compiled = [level for levels in hatch_build.LEVELS.values() for level in levels]
    assert sorted(compiled) == sorted(installed.LEVELS)
    assert [hatch_build.level_of(installed.library_of(level)) for level in compiled] == compiled
    assert hatch_build.level_of(Path("/tmp/libpolymoe_cpu.so")) == "avx512"


@pytest.mark.parametrize(
    ("has", "levels"),
    [
        ("sse2 avx", []), ("avx2 fma", ["avx2"]), ("avx2 fma avx_vnni", ["avxvnni", "avx2"]),
        ("avx2 fma avx512f avx512bw avx512vl avx512_vnni", ["avx512vnni", "avx2"]),
        ("avx2 fma avx512f avx512bw avx512vl avx512_bf16", ["avx512", "avx2"]),
        ("fp asimd", ["neon"]), ("fp asimd asimddp", ["dotprod", "neon"]),
    ],
)  # fmt: skip
def test_what_a_processor_can_run(has: str, levels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("POLYMOE_CPU_LEVEL", "POLYMOE_KERNELS", "POLYMOE_NO_KERNELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(installed, "instructions", lambda: frozenset(has.split()))
    assert installed.processor_levels() == levels
    if not levels:
        assert "neither AVX2 nor NEON" in installed.obstacle()
        return
    monkeypatch.setenv("POLYMOE_CPU_LEVEL", levels[-1])
    assert installed.level() == levels[-1]
    monkeypatch.setenv("POLYMOE_CPU_LEVEL", "avx1024")
    assert installed.obstacle() == f"POLYMOE_CPU_LEVEL=avx1024, where this processor has {', '.join(levels)}"
    other = "dotprod" if levels[0] != "dotprod" else "avx2"
    file = tmp_path / f"libpolymoe_cpu_{other}.so"
    monkeypatch.setenv("POLYMOE_KERNELS", str(file))
    assert "not built" in installed.obstacle()
    file.touch()
    assert installed.obstacle() == f"POLYMOE_KERNELS={file}, where this processor has {', '.join(levels)}"


@pytest.mark.parametrize(
    ("has", "tiles"),
    [
        ("avx2 fma avx512f avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 avx512_vnni", True),  # Zen 4
        ("avx2 fma avx512f avx512bw avx512vl avx512_bf16 avx512_vnni", False), ("avx2 fma", True), ("asimd", True),
    ],
)  # fmt: skip
def test_where_tiles_are_multiplied(has: str, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """VBMI, unlike what came after it, is spelled without an underline: for a while no AVX-512 had tiles."""
    for variable in ("POLYMOE_CPU_LEVEL", "POLYMOE_KERNELS"):
        monkeypatch.delenv(variable, raising=False)
    for module in (installed, tiles_module):
        monkeypatch.setattr(module, "instructions", lambda: frozenset(has.split()))
    monkeypatch.setattr(installed, "library_of", lambda _level: Path(__file__))
    monkeypatch.setattr(tiles_module, "cpu_kernels", object)
    assert tiles_module.can_multiply_tiles.__wrapped__() == tiles
