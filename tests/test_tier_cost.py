"""Host, bus or cache for an absent expert: the arithmetic, on constants like an H100's and an old desktop's."""

import pytest
import torch

from polymoe.model.experts.tier_cost import TierCosts
from polymoe.model.experts.tier_measure import measure_tier_costs

GEN5 = TierCosts(55e9, 10e-6, host_bytes_per_s=200e9, host_flops=2e12, exchange_s=40e-6, mapped_bytes_per_s=50e9)
GEN3_ONE_CORE = TierCosts(
    12e9, 10e-6, host_bytes_per_s=8e9, host_flops=0.1e12, exchange_s=40e-6, mapped_bytes_per_s=12e9
)
MIXTRAL = 352_321_536, 176_160_768  # bytes, parameters of one expert
QWEN3 = 9_437_184, 4_718_592


def test_a_fetch_takes_the_bytes_over_the_bus() -> None:
    assert GEN5.fetch_seconds(MIXTRAL[0]) == pytest.approx(6.4e-3, rel=0.01)  # the table of the issue


def test_few_rows_are_computed_where_the_weights_are() -> None:
    assert GEN5.on_host(1, *MIXTRAL)
    assert not GEN3_ONE_CORE.on_host(1, *MIXTRAL)


def test_many_rows_are_not() -> None:
    """Prefill: 4,096 rows are 1.4 TFLOP, most of a second on the host."""
    assert not GEN5.on_host(4096, *MIXTRAL)
    rows = next(n for n in range(1, 4096) if not GEN5.on_host(n, *MIXTRAL))
    assert GEN5.host_seconds(rows, *MIXTRAL) >= GEN5.fetch_seconds(MIXTRAL[0])
    assert GEN5.host_seconds(rows - 1, *MIXTRAL) < GEN5.fetch_seconds(MIXTRAL[0])


def test_what_stays_in_the_cache_is_worth_fetching() -> None:
    assert GEN5.on_host(1, *QWEN3, uses=1.0)
    assert not GEN5.on_host(1, *QWEN3, uses=10.0)


def test_an_exchange_is_not_free() -> None:
    slow = TierCosts(55e9, 10e-6, 200e9, 2e12, exchange_s=1.0, mapped_bytes_per_s=50e9)
    assert not slow.on_host(1, *MIXTRAL)


def test_decode_reads_in_the_kernel_unless_the_host_is_much_faster() -> None:
    assert not GEN5.decodes_mapped(*MIXTRAL, uses=0.3)  # the host's memory is four times as fast as the bus
    assert GEN3_ONE_CORE.decodes_mapped(*MIXTRAL, uses=0.3)
    assert GEN5.decodes_mapped(*QWEN3, uses=1.0)  # small experts: waiting costs more than the bus
    assert GEN5.decodes_mapped(*MIXTRAL, uses=0.01)  # what is rarely needed is not worth waiting in every layer


def test_constants_are_measured() -> None:
    pytest.importorskip("triton", reason="one is a kernel's")
    costs = measure_tier_costs(torch.device("cpu"), torch.float32, [(256, 128), (128, 128), (128,)])
    assert costs.bus_bytes_per_s > 1e7
    assert costs.host_bytes_per_s > 1e6
    assert costs.host_flops > 1e6
    assert 0 < costs.exchange_s < 1
    assert costs.mapped_bytes_per_s > 0
