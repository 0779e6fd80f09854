"""Whatever bytes come as a manifest, a tensor file or a frame: an error of ours, soon, within a bounded memory.

Bounded examples from a fixed seed, so that a run is the same everywhere; `FUZZ_EXAMPLES=20000` looks further.
"""

import json
import os
import random
import re
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from families import make_family
from polymoe.bundle.manifest import MANIFEST, digest_of, read_manifest, why_not_only_a_bundle
from polymoe.bundle.reader import Bundle
from polymoe.bundle.tensor_file import read_header
from polymoe.engine.channel import Channel
from polymoe.errors import BundleError, CheckpointError, EngineDeadError
from polymoe.offline.api import make_plan
from polymoe.protocol.messages import Abort, Accepted, GetStats, Outputs, Shutdown, decode_command, decode_event, frame
from polymoe.protocol.request import SequenceId

T = TypeVar("T")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
# A parser's objects are larger than the text of them, by some factor, and Python has overheads of its own.
FACTOR, CONSTANT = 200, 4 << 20

bounded = settings(
    max_examples=EXAMPLES, deadline=20_000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

numbers = st.sampled_from([-1, 0, 1, 2, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 1 << 200, 1.5, 1e308, True])
scalars = st.none() | numbers | st.integers() | st.text(max_size=8) | st.sampled_from(["stored", "int4", "../x", "\0"])
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=4), max_leaves=8
)
seeds = st.integers(0, 1 << 32)


def within(size: int, call: Callable[[], T]) -> T:
    """`call()`, which may allocate in proportion to `size` bytes of input."""
    tracemalloc.start()
    try:
        return call()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= FACTOR * size + CONSTANT, f"{peak} bytes for an input of {size}"


def refusal(size: int, call: Callable[[], Any], *errors: type[Exception]) -> str:
    """The message of one of `errors`, "" where `call` raises nothing; anything else passes through."""
    try:
        within(size, call)
    except errors as error:
        return str(error)
    return ""


def mutated(content: bytes, seed: int) -> bytes:
    """`content` with some of its bytes changed, left out, doubled or moved."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 4, 8, 64]))
        match rng.randrange(5):
            case 0:
                data[at:end] = rng.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.choice([b"\0", b"\xff", b"9", b"[", b'"', b"-", b"e9"]) * (end - at)
            case _:
                del data[at:]
    return bytes(data)


def replaced(tree: Any, value: Any, seed: int) -> Any:
    """A copy of a JSON tree where one place, at any depth, holds `value`."""
    rng, copy = random.Random(seed), json.loads(json.dumps(tree))
    node = copy
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            if isinstance(node, dict) and rng.random() < 0.2:
                del node[key]
            else:
                node[key] = value
            return copy
        node = node[key]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    make_plan(make_family("mixtral", root, num_variants=2), "separate", None, root / "bundle")
    return root / "bundle"


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def refused_or_read(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    said = refusal(len(content), lambda: read_manifest(folder), BundleError)
    assert not said or MANIFEST in said or "bundle format" in said
    within(len(content), lambda: why_not_only_a_bundle(folder))


@bounded
@given(content=st.binary(max_size=400) | st.builds(lambda v: json.dumps(v).encode(), values))
def test_a_manifest_of_anything(folder: Path, content: bytes) -> None:
    refused_or_read(folder, content)


@bounded
@given(seed=seeds)
def test_a_manifest_with_changed_bytes(bundle: Path, folder: Path, seed: int) -> None:
    refused_or_read(folder, mutated((bundle / MANIFEST).read_bytes(), seed))


@bounded
@given(value=values, seed=seeds)
def test_a_manifest_that_lies_and_signs_it(bundle: Path, folder: Path, value: Any, seed: int) -> None:
    """The digest agrees, so that everything behind it is asked; what opens has all that it says."""
    fields = replaced(json.loads((bundle / MANIFEST).read_bytes()), value, seed)
    try:
        fields["digest"] = digest_of(msgspec.json.decode(json.dumps(fields)))
    except msgspec.MsgspecError:
        return  # no JSON of msgspec's: the other tests
    (folder / MANIFEST).write_text(json.dumps(fields))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = refusal(size, lambda: Bundle.open(folder, tolerant=bool(seed % 2)), BundleError)
    assert not said or str(folder) in said


def header_of(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    if said := refusal(len(content), lambda: read_header(path), CheckpointError):
        assert str(path) in said
    else:
        assert sum(entry.num_bytes for entry in read_header(path).values()) <= len(content)


@bounded
@given(content=st.binary(max_size=200), length=numbers.filter(lambda n: isinstance(n, int) and 0 <= n < 1 << 64))
def test_a_tensor_file_of_anything(tmp_path: Path, content: bytes, length: int) -> None:
    header_of(content, tmp_path / "x.safetensors")
    header_of(length.to_bytes(8, "little") + content, tmp_path / "x.safetensors")


@bounded
@given(seed=seeds, value=values)
def test_a_tensor_file_with_changed_bytes(bundle: Path, tmp_path: Path, seed: int, value: Any) -> None:
    content = (bundle / "tables.safetensors").read_bytes()
    header_of(mutated(content, seed), tmp_path / "x.safetensors")
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(replaced(json.loads(content[8 : 8 + length]), value, seed)).encode()
    header_of(len(text).to_bytes(8, "little") + text + content[8 + length :], tmp_path / "x.safetensors")


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
small = values.filter(lambda v: not re.search(r"\d{19}", repr(v)))  # msgpack's integers have 64 bits
packed = st.builds(lambda v: msgspec.msgpack.encode(v), small)
FRAMES = [
    frame(GetStats()), frame(Shutdown()), frame(Accepted(3)), frame(Outputs([])),
    frame(Abort([SequenceId("a"), SequenceId("b", 1)])),
]  # fmt: skip


@bounded
@given(body=st.binary(max_size=300) | packed, seed=seeds)
def test_a_frame_of_anything(body: bytes, seed: int) -> None:
    for content in (body, mutated(random.Random(seed).choice(FRAMES)[4:], seed)):
        said = refusal(len(content), lambda body=content: decode_event(body), EngineDeadError)  # type: ignore[misc]
        assert not said or "malformed" in said
        # The engine's process ends with what this raises, and says it.
        refusal(len(content), lambda body=content: decode_command(body), *UNREADABLE)  # type: ignore[misc]


@bounded
@given(seed=seeds, length=st.integers(0, (1 << 32) - 1))
def test_a_stream_that_promises_more_than_comes(seed: int, length: int) -> None:
    """A length of 4 GiB allocates nothing before the bytes are there, and the end of the stream is the end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rest = random.Random(seed).randbytes(20)
        theirs.sendall(frame(GetStats()) + length.to_bytes(4, "big") + rest)
        theirs.close()
        channel = Channel(ours)

        def read() -> None:
            while channel.receive(None):
                pass

        with pytest.raises((EOFError, *UNREADABLE)):
            within(1 << 20, read)
