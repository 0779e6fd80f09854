"""Placement: what lives together, what moves, what is refused; small problems that are solved in seconds."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.placement import GIB, busy, check, compare, problem
from polymoe.cli.main import app
from polymoe.demo import family_paths
from polymoe.deploy.config import of_table
from polymoe.errors import ConfigError, PlanError
from polymoe.place.cost import delta_bits
from polymoe.place.place import place
from polymoe.place.problem import Device, Family, Placement, Problem
from polymoe.place.read import present_placement, read_problem
from polymoe.place.write import deploy_toml, explain


def two_groups(num: int = 4) -> Family:
    """Variants of two lines; within a line 2 % apart, else 50 %. Names alternate, so that order is no help."""
    line = np.arange(2 * num) % 2
    distance = np.where(line[:, None] == line[None], 0.02, 0.5).astype(np.float32)
    np.fill_diagonal(distance, 0.0)
    names = tuple("ab"[line[v]] + str(v) for v in range(2 * num))
    return Family("chat", names, distance, expert_bytes=10 * GIB, nonexpert_bytes=GIB)


def given(family: Family, num: int = 2, memory: int = 60 * GIB, rate: float = 10.0, **rates: float) -> Problem:
    devices = tuple(Device(f"gpu-{number}", memory, rate) for number in range(num))
    return Problem((family,), devices, {name: rates.get(name, 1.0) for name in family.variants})


def test_similar_variants_share_a_device() -> None:
    placed = place(given(two_groups()))
    assert sorted({name[0] for name in pool.shares} for pool in placed.pools) == [{"a"}, {"b"}]
    # 10 GiB of experts, four non-experts, and 1 bit (log2(2 % / 1 %)) a weight for three variants.
    assert [pool.num_bytes for pool in placed.pools] == [pytest.approx((10 + 4 + 3 * 10 / 16) * GIB, rel=1e-6)] * 2


def test_a_busy_variant_has_replicas() -> None:
    asked = given(two_groups(), num=4, a0=22.0)
    placed = place(asked)
    check(asked, placed)
    assert len(placed.homes()["a0"]) >= 3  # 22 requests a second, 10 a device
    assert max(busy(asked, placed)) <= 1.0


def test_delta_bits() -> None:
    bits = delta_bits(np.array([0.0, 0.005, 0.01, 0.02, 0.64, 1e9], dtype=np.float32), 0.01, 16)
    np.testing.assert_allclose(bits, [0, 0, 0, 1, 6, 16], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_against_first_fit(seed: int) -> None:
    """A small instance of what benchmarks/placement.py measures."""
    figures = compare(problem(300, 15, 3, seed), seed)
    assert figures["saved"] > 0.1, figures
    assert figures["less_error_at_equal_bytes"] > 0.25, figures
    assert figures["busiest"] <= figures["first_fit_busiest"] + 0.01, figures
    assert figures["add_one_moved"] <= 0.01, figures


def test_a_lost_device_moves_only_its_own_variants() -> None:
    asked = problem(200, 12, 1, 0, utilisation=0.5)
    placed = place(asked)
    lost = placed.pools[0].device
    fewer = replace(asked, devices=tuple(device for device in asked.devices if device.name != lost))
    after = place(fewer, placed)
    check(fewer, after)
    moved = after.moved(placed)
    others = [name for name in moved if lost not in placed.homes()[name]]
    assert len(others) <= 0.01 * 200, others


def test_present_is_kept_when_nothing_changed() -> None:
    asked = problem(120, 8, 2, 1)
    placed = place(asked)
    assert place(asked, placed).moved(placed) == []


def test_removed_variants_leave_and_nobody_moves() -> None:
    family = two_groups()
    asked = given(family)
    placed = place(asked)
    rest = list(range(1, 8))
    smaller = replace(family, variants=family.variants[1:], distance=family.distance[np.ix_(rest, rest)])
    after = place(replace(asked, families=(smaller,), rates=dict.fromkeys(smaller.variants, 1.0)), placed)
    assert after.moved(placed) == []
    assert family.variants[0] not in after.homes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 8 * GIB}, "more than any device has"),
        ({"memory": 12 * GIB}, "Add a device, drop variants"),
        ({"rate": 3.0}, "add devices for 2.0 more"),
    ],
)
def test_what_cannot_fit_says_what_to_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        place(given(two_groups(), **change))


def test_more_families_than_devices() -> None:
    one, other = two_groups(), replace(two_groups(), name="code", variants=tuple(f"c{v}" for v in range(8)))
    devices = (Device("gpu", 60 * GIB, 100.0),)
    with pytest.raises(PlanError, match="1 devices for 2 families"):
        place(Problem((one, other), devices, dict.fromkeys(one.variants + other.variants, 1.0)))


def test_problems_that_cannot_be_meant() -> None:
    family, device = two_groups(), Device("gpu", GIB, 1.0)
    rates = dict.fromkeys(family.variants, 1.0)
    for wrong, message in (
        ({"rates": rates | {"nobody": 1.0}}, "rate is given to nobody"),
        ({"rates": {}}, "has no rate"),
        ({"rates": rates | {"a0": float("nan")}}, "rate of a0"),
        ({"devices": (device, device)}, "device gpu is given twice"),
        ({"families": (family, replace(family, name="other"))}, "variant a0 is given twice"),
        ({"families": ()}, "no variant"),
        ({"error": 0.0}, "error must be between"),
    ):
        with pytest.raises(ConfigError, match=message):
            Problem(**{"families": (family,), "devices": (device,), "rates": rates} | wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="symmetric"):
        replace(family, distance=np.triu(family.distance))
    with pytest.raises(ConfigError, match="distances must be numbers"):
        replace(family, distance=np.full_like(family.distance, np.nan))


def test_the_deploy_file_says_what_was_placed() -> None:
    asked = given(two_groups(), num=4, a0=22.0)
    placed = place(asked)
    config = of_table(tomllib.loads(deploy_toml(asked, placed)), "deploy.toml")
    assert sum(pool.replicas for pool in config.pools) == len(placed.pools)
    again = present_placement(config)
    assert again.homes() == placed.homes()
    assert place(asked, again).moved(placed) == []
    text = "\n".join(explain(asked, placed))
    assert "1.0 bits a weight" in text
    assert "of its requests, as it is on" in text


def test_command_with_the_demo_family(tmp_path: Path) -> None:
    """inspect --json, place --explain, and place again with one variant's rate changed."""
    specs = [f"{name}={path}" for name, path in family_paths().items()]
    run = CliRunner().invoke
    result = run(app, ["inspect", *specs, "--json", str(tmp_path / "demo.json"), "--png", str(tmp_path / "d.png")])
    assert result.exit_code == 0, result.output
    asked = tmp_path / "place.toml"
    text = (
        '[[family]]\nname = "demo"\ndistances = "demo.json"\n'
        '[[device]]\nname = "cpu"\ncount = 2\nmemory = "64MiB"\nrequests_per_second = 10\n'
        "[rate]\nbase = 8\nmath = 1\ndrama = 1\ncode = 1\n"
    )
    asked.write_text(text)
    out = tmp_path / "deploy.toml"
    result = run(app, ["place", str(asked), "--out", str(out), "--explain"])
    assert result.exit_code == 0, result.output
    assert "bits a weight" in result.output
    asked.write_text(text.replace("math = 1", "math = 2"))
    result = run(app, ["place", str(asked), "--out", str(tmp_path / "new.toml"), "--present", str(out)])
    assert result.exit_code == 0, result.output
    assert "0 variants move" in result.output
    again = run(app, ["place", str(asked), "--out", str(out)])
    assert isinstance(again.exception, ConfigError)
    assert "--force" in str(again.exception)
    problem_read = read_problem(asked)
    assert problem_read.rates["math"] == 2
    assert isinstance(place(problem_read), Placement)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[family", "not a TOML file"),
        ('[[family]]\nname = "x"\n[rate]\n', "place.toml"),
        ('[[family]]\nname="x"\ndistances="none.json"\n[[device]]\nname="g"\nmemory="1GiB"\n'
         "requests_per_second=1\n[rate]\na=1\n", "polymoe inspect"),
        ('[[family]]\nname="x"\ndistances="bad.json"\n[[device]]\nname="g"\nmemory="1GiB"\n'
         "requests_per_second=1\n[rate]\na=1\n", "is not what"),
        ('family=[]\n[[device]]\nname="g"\nmemory="1GiB"\nreserve="2GiB"\nrequests_per_second=1\n[rate]\n',
         "reserves all"),
        ('family=[]\ndevice=[]\nrates={}\n[rate]\n', "unknown field `rates`"),
    ],
)  # fmt: skip
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "place.toml").write_text(text)
    (tmp_path / "bad.json").write_text('{"variants": 3}')
    with pytest.raises(ConfigError, match=message):
        read_problem(tmp_path / "place.toml")
