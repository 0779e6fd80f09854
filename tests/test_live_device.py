"""Variants come and go on a GPU's path, run on a CPU: what was captured stays valid, or is captured again.

A CUDA graph is stood in for by `RecordedGraph`, which freezes what a graph would: numbers, addresses and operations.
Nothing here has run on a GPU.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="the GPU's kernels need Triton")

from polymoe.bundle.live import LiveState
from polymoe.bundle.reader import Bundle
from polymoe.bundle.rewrite import rewrite_manifest
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.engine.live import check_live
from polymoe.errors import ConfigError
from polymoe.kernels.cpu.packed_pool import ExactPool
from polymoe.model.backends.cuda import CudaBackend
from polymoe.model.graphs.decode_graphs import DecodeGraphs
from polymoe.model.memory_plan import weight_bytes
from polymoe.model.transfer.beside import BesideSteps
from polymoe.offline.addition.new_variant import open_new
from polymoe.offline.addition.write_addition import write_addition
from polymoe.protocol.messages import ChangeFailed, Message, VariantAdded
from polymoe.protocol.request import EngineRequest, SequenceId, TokenSampling
from polymoe.server.variant_change import with_state
from recorded_graph import RecordedGraph, addresses
from references import Case
from test_live_engine import Live, make_live, make_patch
from test_live_packed import make_packed

AMPLE = 1 << 22


def on_device(arch: str, folder: Path, headroom: int = AMPLE, **options: Any) -> Live:
    engine = {"headroom": headroom, "max_num_seqs": 8, "max_model_len": 64}
    live = make_live(arch, folder, engine=engine, backend=CudaBackend(reference=True), **options)
    record(live)
    return live


def graphs_of(live: Live) -> DecodeGraphs:
    graphs = live.engine.runner.graphs
    assert graphs is not None
    return graphs


def record(live: Live) -> None:
    """Capture all decode steps; from now on they are replayed, or there is a reason why not."""
    graphs, backend = graphs_of(live), live.engine.model.context.backend
    compute, recording = graphs._compute, [False]

    def watched(size: int) -> torch.Tensor:
        assert recording[0] or graphs.is_behind, "a step that was captured is computed"
        return compute(size)

    def stand_in(size: int) -> Any:
        recording[0] = True
        with RecordedGraph(backend) as graph:
            logits = compute(size)
        recording[0] = False
        return graph, logits

    graphs.record = stand_in
    graphs._compute = watched  # type: ignore[method-assign]
    graphs._dropped = list(graphs.sizes)
    while graphs.is_behind:
        graphs.catch_up()


def held(live: Live) -> set[int]:
    return addresses(live.engine.model, graphs_of(live).batch)


@contextmanager
def captured_steps_stay(live: Live) -> Iterator[None]:
    """Whatever happens in here leaves all graphs as they are, and what they read where it is."""
    graphs = graphs_of(live)
    before = dict(graphs._captured)
    read = {size: graph.read & held(live) for size, (graph, _) in before.items()}  # type: ignore[attr-defined]
    assert before
    assert all(len(found) > 10 for found in read.values())
    yield
    assert {size: id(found) for size, found in graphs._captured.items()} == {s: id(c) for s, c in before.items()}
    assert all(found <= held(live) for found in read.values()), "a graph reads what is gone"


def generated(live: Live, cases: list[Case]) -> list[list[int]]:
    """Greedy tokens of all cases, in mixed steps."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(cases))}
    for i, case in enumerate(cases):
        sampling = TokenSampling(max_tokens=case.max_tokens, temperature=0.0)
        live.engine.add_request(
            EngineRequest(
                request_id=SequenceId(str(i)), variant=live.places[case.variant], prompt_token_ids=case.prompt,
                sampling=sampling,
            )
        )  # fmt: skip
    while live.engine.has_work():
        for output in live.engine.step():
            tokens[output.request_id.request].extend(output.new_token_ids)
    return list(tokens.values())


def check(live: Live, cases: list[Case]) -> None:
    assert generated(live, cases) == [case.tokens for case in cases]
    live.engine.check_integrity()


def of(live: Live, *names: str) -> list[Case]:
    prompts = [[5, 9, 33, 7], [3], [40, 41, 42, 43, 44, 45, 46]]
    return [live.family.case(name, prompt, 9) for prompt in prompts for name in names]


def another(live: Live, name: str, share: float) -> Path:
    """A checkpoint that differs from the first in a share of its values."""
    family, folder = live.family, live.folder / "checkpoints" / name
    shutil.copytree(family.paths["base"], folder)
    patched = make_patch(family.paths["base"], live.folder / f"{name}.safetensors", share, seed=len(name))
    save_file(patched, folder / "model.safetensors", {"format": "pt"})
    family.paths[name] = folder
    if "models" in vars(family):
        del family.models
    return folder


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_captured_steps_see_who_comes_and_goes(arch: str, tmp_path: Path) -> None:
    """Add, replace and remove without a graph captured anew: rows, room and tables change in place."""
    live = on_device(arch, tmp_path)
    another(live, "other", 0.99)
    before = live.engine.model.resident_bytes
    with captured_steps_stay(live):
        check(live, of(live, "base", "v1"))
        live.add("v2", live.family.paths["v2"])
        check(live, of(live, "base", "v1", "v2"))
        live.add("other", live.family.paths["other"])  # as a replacement: both are there for a while
        check(live, of(live, "v2", "other"))
        live.drop("v2")
        check(live, of(live, "base", "v1", "other"))
        first = live.places["other"]
        live.drop("other")
        live.add("v2", live.family.paths["v2"])
        live.add("other", live.family.paths["other"])
        assert first in (live.places["v2"], live.places["other"])
        check(live, of(live, "base", "v1", "v2", "other"))
        live.drop("v2")
        live.drop("other")
        check(live, of(live, "base", "v1"))
    assert live.engine.model.resident_bytes == before
    assert not any(group.reserved for group in live.engine.model.groups)


def test_lossless_deltas_of_several_are_one_pool(tmp_path: Path) -> None:
    """The kernels take one; so patches are joined, and steps captured again, uncaptured ones being as right."""
    live = on_device("mixtral", tmp_path)
    before = live.engine.model.resident_bytes
    names = ("few", "fewer")
    for name, share in zip(names, (0.05, 0.02), strict=True):
        another(live, name, share)
        folder, addition = live.plan(name, live.family.paths[name])
        assert addition.delta_bytes > 0 == addition.expert_bytes
        assert live.engine.live is not None
        live.engine.live.add(1, str(folder), addition)
        events: list[Message] = []
        while not events:
            events = live.engine.live.poll()
        assert isinstance(events[0], VariantAdded)
        live.places[name] = events[0].info.place
        graphs = graphs_of(live)
        assert graphs.num_captured == 0
        assert graphs.is_behind
        check(live, of(live, "base", name))  # uncaptured
        live.change()
        assert graphs.num_captured == len(graphs.sizes)
    with captured_steps_stay(live):
        check(live, of(live, "base", "v1", *names))
    for layer in live.engine.model.pool.layers:
        assert layer.compressed is not None
        assert [len(pool) for pool in layer.compressed.deltas if isinstance(pool, ExactPool)] == [8]
        assert layer.compute.path.runs_on == "GPU kernels"
    for name in names:
        live.drop(name)
        check(live, of(live, "base", "v1", *(n for n in names if n in live.places)))
    assert live.engine.model.resident_bytes == before


@pytest.mark.parametrize("way", ["few bits", "too little room", "one for all until now"])
def test_what_needs_memory_of_its_own_is_captured_again(way: str, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "few bits": {"policy": "delta"},
        "too little room": {"headroom": 140_000},
        "one for all until now": {"frozen": "norm|q_proj|embed"},
    }
    options = ways[way]
    live = on_device("mixtral", tmp_path, **options)
    if "frozen" in options:
        live.family.paths["v2"] = another(live, "v3", 0.99)
    graphs, before = graphs_of(live), live.engine.model.resident_bytes
    old, planned = dict(graphs._captured), generated(live, of(live, "base", "v1"))
    live.add("v2", live.family.paths["v2"], **({"bits": 4} if way == "few bits" else {}))
    assert graphs.num_captured == len(graphs.sizes)
    assert not set(map(id, old.values())) & set(map(id, graphs._captured.values()))
    with captured_steps_stay(live):
        if way == "few bits":
            replayed = generated(live, of(live, "base", "v1", "v2"))
        else:
            check(live, of(live, "base", "v1", "v2"))
    if way == "few bits":
        graphs.drop()
        assert generated(live, of(live, "base", "v1", "v2")) == replayed
        live.change()
    live.drop("v2")
    assert generated(live, of(live, "base", "v1")) == planned
    if way != "one for all until now":  # what became a stack stays one
        assert live.engine.model.resident_bytes == before


@pytest.mark.parametrize("bits", [None, 3])
def test_packed_matrices(bits: int | None, tmp_path: Path) -> None:
    live, cases = make_packed("mixtral", tmp_path, backend=CudaBackend(reference=True))
    record(live)
    before = live.engine.model.resident_bytes
    planned = [case for case in cases if case.variant != "v2"]
    check(live, planned)
    live.add("v2", live.family.paths["v2"], bits=bits)
    graphs = graphs_of(live)
    assert graphs.num_captured == len(graphs.sizes)
    with captured_steps_stay(live):
        if bits is None:
            check(live, cases)
        replayed = generated(live, cases)
    graphs.drop()
    assert generated(live, cases) == replayed
    live.drop("v2")
    check(live, planned)
    assert live.engine.model.resident_bytes == before


def test_no_room(tmp_path: Path) -> None:
    live = on_device("mixtral", tmp_path, headroom=20_000)
    folder, addition = live.plan("v2", live.family.paths["v2"])
    assert live.engine.live is not None
    with captured_steps_stay(live):
        live.engine.live.add(3, str(folder), addition)
        (event,) = live.change()
        assert isinstance(event, ChangeFailed)
        assert "--headroom" in event.message
        check(live, of(live, "base", "v1"))


def test_a_damaged_file_gives_its_room_back(tmp_path: Path) -> None:
    live = on_device("mixtral", tmp_path)
    with captured_steps_stay(live):
        for _ in range(30):  # more than there is room for
            folder, addition = live.plan("v2", live.family.paths["v2"])
            file = folder / "layer-001.safetensors"
            file.write_bytes(file.read_bytes()[:-5])
            assert live.engine.live is not None
            live.engine.live.add(3, str(folder), addition)
            (event,) = live.change()
            assert isinstance(event, ChangeFailed)
        live.add("v2", live.family.paths["v2"])
        check(live, of(live, "base", "v1", "v2"))


def test_what_was_added_is_in_the_first_graphs_of_the_next_start(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    folder = tmp_path / "written"
    folder.mkdir()
    opened = Bundle.open(live.bundle)
    addition, files = write_addition(opened, open_new(opened, "v2", str(live.family.paths["v2"])), folder, bits=5)
    (live.bundle / addition.folder).parent.mkdir()
    folder.rename(live.bundle / addition.folder)
    names = {"base": opened.variants[0].version, "v1": opened.variants[1].version, "v2": addition.version}
    rewrite_manifest(live.bundle, lambda manifest: with_state(manifest, LiveState(names=names), addition, files))
    config = EngineConfig(
        bundle=str(live.bundle), device="cpu", dtype="float32", kv_cache_bytes=1 << 23, block_size=4, max_variants=4,
        headroom=AMPLE, max_num_seqs=8, max_model_len=64,
    )  # fmt: skip
    live.engine = EngineCore(config, backend=CudaBackend(reference=True))
    live.places = live.engine.info.names
    record(live)
    assert live.engine.live is not None
    with captured_steps_stay(live):
        assert not live.engine.live.is_busy
        assert live.engine.live.poll() == []
        check(live, of(live, "base", "v1"))
        replayed = generated(live, of(live, "v2"))
    graphs_of(live).drop()
    assert generated(live, of(live, "v2")) == replayed


def test_options_that_a_gpu_needs(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    config = EngineConfig(bundle=str(live.bundle), max_variants=4)
    bundle, gpu = live.engine.bundle, torch.device("cuda")
    with pytest.raises(ConfigError, match="needs --headroom"):
        check_live(config, bundle, gpu)
    config = EngineConfig(bundle=str(live.bundle), max_variants=4, headroom=1 << 30)
    check_live(config, bundle, gpu)
    bundle.manifest.host_experts[0] = 1
    with pytest.raises(ConfigError, match="not on the device"):
        check_live(config, bundle, gpu)
    bundle.manifest.host_experts[0] = 0
    shapes = {name: bundle.nonexpert(0, name).shape for name in bundle.nonexpert_names}
    planned, more = (weight_bytes(bundle, shapes, 2, 4, most).nonexperts_own for most in (0, 6))
    assert more == 3 * planned


class _Stream:
    """What is given to a stream, in order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: "_Event") -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class _Event:
    def __init__(self, current: list[_Stream]) -> None:
        self.current, self.name = current, ""

    def record(self) -> None:
        self.name = f"an event of {self.current[-1].name}"
        self.current[-1].log.append(self.name)


def test_copies_wait_for_steps_and_steps_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on a GPU's streams, told by stand-ins: no copy before the mark's steps are done, no step before the
    copies after `join`, and the steps' stream waits for nothing else."""
    log: list[str] = []
    current = [_Stream("steps", log)]

    @contextmanager
    def stream(own: _Stream) -> Iterator[None]:
        current.append(own)
        yield
        current.pop()

    for name, stand_in in (
        ("Stream", lambda _device: _Stream("copies", log)),
        ("Event", lambda: _Event(current)),
        ("stream", stream),
        ("current_stream", lambda: current[-1]),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    beside = BesideSteps(torch.device("cuda"))
    beside.mark()
    with beside.copying():
        current[-1].log.append(f"a copy on {current[-1].name}")
    log.append("a step")
    beside.join()
    beside.join()
    assert log == [
        "an event of steps", "copies waits for an event of steps", "a copy on copies", "an event of copies", "a step",
        "steps waits for an event of copies",
    ]  # fmt: skip
