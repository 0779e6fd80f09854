"""`polymoe` as a library: what a type checker sees, several threads, streams, plans on the fly, `AsyncLLM`."""

import asyncio
import gc
import io
import itertools
import os
import pty
import runpy
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polymoe
from polymoe import LLM, AsyncLLM, RequestOutput, SamplingParams
from polymoe.console import Console
from polymoe.demo import family_paths
from polymoe.errors import ConfigError, EngineDeadError, RequestError, UnknownVariantError
from polymoe.llm.batch_progress import batch_progress
from polymoe.offline.api import make_plan
from polymoe.protocol.request import CompletionOutput
from zygote import zygote

OPTIONS: dict[str, Any] = {"device": "cpu", "kv_cache_bytes": 1 << 26}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plan(family_paths(), "paper", "1.0x", tmp_path_factory.mktemp("api") / "bundle").path


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[LLM]:
    with LLM(bundle, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def new_llm(bundle: Path) -> Iterator[LLM]:
    with LLM(bundle, **OPTIONS) as llm:
        yield llm


def ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def is_idle(llm: LLM) -> bool:
    llm.engine.check_integrity()
    return not llm.engine.has_work() and llm.processor.num_sequences == 0 and not llm._shared._tickets


# --- types


def test_a_type_checker_sees_every_public_name(tmp_path: Path) -> None:
    """A module `__getattr__` made `LLM` and every name that does not exist `Any`: nothing was checked."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""\
        import polymoe
        from polymoe import LLM, AsyncLLM, SamplingParams

        with LLM({"base": "a", "code": "b"}, memory="1.0x") as llm:
            outputs = llm.generate("x", SamplingParams(temperature=0), variants="base")
            reveal_type(outputs[0].outputs[0].text)
            reveal_type(llm.chat([{"role": "user", "content": "x"}], variants=["base", "code"]))
            reveal_type(next(llm.stream("x", variant="base")).finished)
            llm.generat("x")
            llm.generate(1.5)
            SamplingParams(temprature=0)
            SamplingParams(stop="x")
        polymoe.Nothing

        async def main(llm: AsyncLLM) -> None:
            async for output in llm.generate("x", variant="code"):
                reveal_type(output)
    """)
        + "".join(f"reveal_type(polymoe.{name})\n" for name in polymoe.__all__)
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n"
        "[mypy-torch.*,transformers.*,rich.*,numpy.*,fastapi.*,safetensors.*,tokenizers.*,jinja2.*]\n"
        "follow_imports = skip\nignore_missing_imports = True\n"
        # Behind the doors: checked with the package, and no public name is from there.
        "[mypy-polymoe.model.*,polymoe.kernels.*,polymoe.offline.*,polymoe.quant.*,polymoe.native.*,polymoe.text.*]\n"
        "follow_imports = skip\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "mine.py"], capture_output=True, text=True,
        check=False, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(Path(polymoe.__file__).parents[1])}, timeout=300,
    )  # fmt: skip
    notes = [line.partition("note: Revealed type is ")[2] for line in result.stdout.splitlines() if "Revealed" in line]
    errors = [line.partition("error: ")[2] for line in result.stdout.splitlines() if "error:" in line]
    found = [note.strip('"').replace("builtins.", "") for note in notes]
    assert found[:4] == [
        "str", "list[polymoe.protocol.request.RequestOutput]", "bool", "polymoe.protocol.request.RequestOutput",
    ], result.stdout  # fmt: skip
    assert len(found) == 4 + len(polymoe.__all__)
    assert not [note for note in found if note == "Any"]
    for error, words in zip(errors, ("generat", "Argument 1", "temprature", '"stop"', "Nothing"), strict=True):
        assert words in error


def test_names_come_from_where_the_type_checker_looks() -> None:
    for name, home in polymoe._HOMES.items():
        assert getattr(polymoe, name) is getattr(sys.modules[home], name)
    assert {*polymoe._HOMES, "__version__"} == set(polymoe.__all__) == set(dir(polymoe))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = polymoe.Nothing  # type: ignore[attr-defined]


# --- threads


def in_threads(count: int, work: Any) -> list[Any]:
    """What `work(i)` returns or raises, each in a thread of its own, started together."""
    found: dict[int, Any] = {}
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = work(index)
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    return [found[i] for i in range(count)]


def test_threads_share_the_batches(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in `generate` were an assertion in one and a hang in the other."""
    prompts = [f"Question {i}: how many" for i in range(8)]
    alone = [ids(llm.generate(p, GREEDY, llm.variants[i % 4])[0]) for i, p in enumerate(prompts)]
    sizes: list[int] = []
    step = llm.engine.step

    def counted() -> list[Any]:
        outputs = step()
        sizes.append(len(outputs))
        time.sleep(0.002)  # a step of a larger model, in which the other threads come
        return outputs

    monkeypatch.setattr(llm.engine, "step", counted)
    found = in_threads(8, lambda i: ids(llm.generate(prompts[i], GREEDY, llm.variants[i % 4])[0]))
    assert found == alone
    assert max(sizes) >= 6
    assert len(sizes) < 8 * GREEDY.max_tokens / 2
    assert is_idle(llm)


def test_threads_with_batches_streams_and_mistakes(llm: LLM) -> None:
    want = [ids(o) for o in llm.generate(["a b", "c d"], GREEDY, variants=["math", "code"])]

    def work(index: int) -> Any:
        match index % 4:
            case 0:
                return [ids(o) for o in llm.generate(["a b", "c d"], GREEDY, variants=["math", "code"])]
            case 1:
                return [ids(list(llm.stream(p, GREEDY, v))[-1]) for p, v in (("a b", "math"), ("c d", "code"))]
            case 2:
                for output in llm.stream("a b", LONG, "math"):
                    if len(ids(output)) > 5 + index:
                        break
                return "left"
        return llm.generate("a", GREEDY, "poet")

    found = in_threads(12, work)
    for index, result in enumerate(found):
        match index % 4:
            case 0 | 1:
                assert result == want
            case 2:
                assert result == "left"
            case 3:
                assert isinstance(result, UnknownVariantError)
    gc.collect()
    assert is_idle(llm)


def test_more_threads_than_the_queue_holds(bundle: Path) -> None:
    with LLM(bundle, **OPTIONS, max_waiting=1, max_num_seqs=2) as llm:
        found = in_threads(6, lambda i: [o.prompt_token_ids for o in llm.generate([[9 + i]] * 4, GREEDY, "code")])
        assert found == [[[9 + i]] * 4 for i in range(6)]
        assert is_idle(llm)


def test_a_large_batch_does_not_keep_a_small_one_waiting(bundle: Path) -> None:
    """Requests of several calls enter the engine's queue in turn."""
    with LLM(bundle, **OPTIONS, max_waiting=2, max_num_seqs=2) as llm:
        done: list[str] = []

        def work(index: int) -> None:
            if index:
                time.sleep(0.05)
            llm.generate([[7]] * (1 if index else 60), GREEDY, "code", on_output=lambda _: done.append(f"{index}"))

        assert in_threads(2, work) == [None, None]
        assert done.index("1") < 55


def test_an_error_in_a_callback_or_an_interrupt_leaves_the_others_running(llm: LLM) -> None:
    want = ids(llm.generate("a b", GREEDY, "math")[0])

    def fail(_: RequestOutput) -> None:
        raise KeyboardInterrupt

    def work(index: int) -> Any:
        if index == 0:
            return llm.generate([[5]] * 3, [SamplingParams(max_tokens=2), LONG, LONG], "code", on_output=fail)
        return ids(llm.generate("a b", GREEDY, "math")[0])

    first, *others = in_threads(4, work)
    assert isinstance(first, KeyboardInterrupt)
    assert others == [want] * 3
    assert is_idle(llm)


def test_a_callback_may_generate(llm: LLM) -> None:
    inner: list[list[int]] = []

    def once_more(_: RequestOutput) -> None:
        inner.append(ids(llm.generate("c", GREEDY, "code")[0]))

    llm.generate(["a", "b"], GREEDY, "math", on_output=once_more)
    once_more(llm.generate("d", GREEDY, "code")[0])
    assert inner == [inner[0]] * 3


def test_a_step_that_fails_ends_every_call(new_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = new_llm.engine.step, 0

    def failing() -> Any:
        nonlocal calls
        calls += 1
        time.sleep(0.02)
        if calls == 10:
            raise MemoryError("no room")
        return step()

    monkeypatch.setattr(new_llm.engine, "step", failing)
    found = in_threads(4, lambda _: new_llm.generate("a b", LONG, "math"))
    assert sorted(type(error).__name__ for error in found) == ["EngineDeadError"] * 3 + ["MemoryError"]
    assert any("A step of the engine failed (MemoryError: no room)" in str(error) for error in found)
    assert ids(new_llm.generate("a b", GREEDY, "math")[0])  # the next call is another matter


# --- life


def test_close_gives_the_memory_back(bundle: Path) -> None:
    llm = LLM(bundle, **OPTIONS)
    llm.generate("a", GREEDY, "math")
    model, pool = weakref.ref(llm.engine.model), weakref.ref(llm.engine.model.pool)
    llm.close()
    llm.close()
    assert (model(), pool()) == (None, None)
    for call in (lambda: llm.generate("a", variants="math"), lambda: next(llm.stream("a", variant="math")),
                 lambda: llm.chat(CHAT, variants="math"), lambda: llm.variants, lambda: llm.engine):  # fmt: skip
        with pytest.raises(EngineDeadError, match="closed"):
            call()


def test_close_ends_what_runs_in_other_threads(bundle: Path) -> None:
    llm = LLM(bundle, **OPTIONS)
    running = threading.Event()

    def work(index: int) -> Any:
        if index == 0:
            running.wait(30)
            return llm.close()
        for output in llm.stream("a b", LONG, "math"):
            if len(ids(output)) == 3:
                running.set()
        return "it ended"

    first, *others = in_threads(4, work)
    assert first is None
    assert all(isinstance(error, EngineDeadError) for error in others), others


# --- prompts


def test_one_prompt_for_several_variants(llm: LLM) -> None:
    outputs = llm.generate("ROMEO:", GREEDY, variants=["math", "drama"])
    assert [o.variant for o in outputs] == ["math", "drama"]
    assert [ids(o) for o in outputs] == [ids(llm.generate("ROMEO:", GREEDY, v)[0]) for v in ("math", "drama")]
    assert [o.variant for o in llm.generate([5, 6], GREEDY, variants=llm.variants)] == llm.variants


def test_chat_is_the_template_and_then_the_prompt(llm: LLM) -> None:
    tokenizer = llm.processor.require_tokenizer("math", "a test")
    text = tokenizer.render_chat(CHAT)
    (output,) = llm.chat(CHAT, GREEDY, variants="math")
    assert (output.prompt, output.prompt_token_ids) == (text, tokenizer.encode_chat(CHAT))
    assert ids(output) == ids(llm.generate([output.prompt_token_ids], GREEDY, "math")[0])
    other = [*CHAT, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    outputs = llm.chat([CHAT, other], GREEDY, variants=["math", "code"])
    assert outputs[0].prompt == text
    assert "Bye" in (outputs[1].prompt or "")
    assert [o.variant for o in llm.chat(CHAT, GREEDY, variants=llm.variants)] == llm.variants
    opened = llm.chat(CHAT, GREEDY, variants="math", chat_template_kwargs={"add_generation_prompt": False})
    assert opened[0].prompt == tokenizer._tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("prompts", [{"prompt": "a"}, [{"prompt": "a"}], 5, [1.5], ["a", 5], [[1.5]], b"a", [None]])
def test_what_is_no_prompt(prompts: Any, llm: LLM) -> None:
    """A dictionary was the list of its keys."""
    with pytest.raises(RequestError, match="a prompt must be a text or a list of token ids, got"):
        llm.generate(prompts, variants="math")


@pytest.mark.parametrize("messages", ["hi", [{"content": "a"}], [[]], {"role": "user", "content": "a"}, [CHAT, "b"]])
def test_what_is_no_conversation(messages: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="messages must be a conversation"):
        llm.chat(messages, variants="math")


def test_an_empty_batch(llm: LLM) -> None:
    assert llm.generate([], GREEDY, "math") == []


# --- streams


def test_a_stream_adds_up_to_the_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1)
    (whole,) = llm.generate("ROMEO:", params, "drama")
    growing = list(llm.stream("ROMEO:", params, "drama"))
    texts = [o.outputs[0].text for o in growing]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert [o.finished for o in growing] == [False] * (len(growing) - 1) + [True]
    last, streamed = growing[-1].outputs[0], whole.outputs[0]
    assert (last.text, last.token_ids, last.logprobs) == (streamed.text, streamed.token_ids, streamed.logprobs)
    assert (last.finish_reason, growing[-1].prompt_logprobs) == ("length", whole.prompt_logprobs)
    assert (growing[0].prompt, growing[0].prompt_token_ids) == (whole.prompt, whole.prompt_token_ids)
    pieces = list(llm.stream("ROMEO:", params, "drama", delta=True))
    assert "".join(o.outputs[0].text for o in pieces) == streamed.text
    assert [t for o in pieces for t in ids(o)] == streamed.token_ids
    assert len(growing) == len(pieces) == 12


def test_streams_of_conversations_and_of_several_sequences(llm: LLM) -> None:
    (whole,) = llm.chat(CHAT, GREEDY, "math")
    assert ids(list(llm.stream(CHAT, GREEDY, "math"))[-1]) == ids(whole)
    params = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    outputs = list(llm.stream("a", params, "code"))
    want = llm.generate("a", params, "code")[0].outputs
    assert [o.token_ids for o in outputs[-1].outputs] == [o.token_ids for o in want]
    assert outputs[-1].finished
    pieces: dict[int, list[int]] = {}
    for output in llm.stream("a", params, "code", delta=True):
        for completion in output.outputs:
            pieces.setdefault(completion.index, []).extend(completion.token_ids)
    assert [pieces[i] for i in range(3)] == [o.token_ids for o in want]


def test_leaving_a_stream_ends_the_request(llm: LLM) -> None:
    stream = llm.stream("a", LONG, "math")
    next(stream)
    assert llm.engine.has_work()
    stream.close()
    assert is_idle(llm)
    with pytest.raises(RequestError, match="say which of the variants: base, math"):
        next(llm.stream("a"))


# --- plans on the fly


def test_checkpoints_are_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMOE_CACHE", str(tmp_path))
    paths = {name: family_paths()[name] for name in ("base", "code")}
    with LLM(paths, memory="1.0x", **OPTIONS) as llm:
        assert llm.variants == ["base", "code"]
        first = ids(llm.generate("def f(", GREEDY, "code")[0])
        path = llm.engine.bundle.path
        assert path.parent == tmp_path / "bundles"
        assert (llm.engine.bundle.manifest.policy, llm.engine.bundle.manifest.memory) == ("auto", "1.0x")
    made = (path / "manifest.json").stat().st_mtime_ns
    with LLM(paths, memory="1.0x", **OPTIONS) as llm:
        assert ids(llm.generate("def f(", GREEDY, "code")[0]) == first
    assert (path / "manifest.json").stat().st_mtime_ns == made
    with LLM(paths, policy="separate", **OPTIONS) as llm:
        assert llm.engine.bundle.manifest.policy == "separate"


def test_a_plan_for_a_bundle_is_refused(bundle: Path) -> None:
    for options in ({"memory": "1.0x"}, {"policy": "paper"}):
        with pytest.raises(ConfigError, match="planned already; policy and memory are for checkpoints"):
            LLM(bundle, **options)
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM({"a": "/nowhere"}, max_num_seq=2)
    with pytest.raises(ConfigError, match=r'memory must be a text such as "1.0x" or "24GiB", got 1\.0'):
        LLM({"a": "/nowhere"}, memory=1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"checkpoints are \{name: path, …\}, got 'a': 5"):
        LLM({"a": 5})  # type: ignore[dict-item]


# --- the bar


def test_the_bar_of_a_batch() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    done = RequestOutput(request_id="r", variant="v", prompt=None, prompt_token_ids=[1],
                         outputs=[CompletionOutput(index=0, text="", token_ids=[1, 2])])  # fmt: skip
    with batch_progress(2, True, console) as advance:
        advance(done)
        time.sleep(0.3)
    assert "Generating" in file.getvalue()
    assert "1/2" in file.getvalue()
    assert "tokens/s" in file.getvalue()
    for total, wanted, terminal in ((1, True, True), (5, False, True), (5, True, False)):
        file = io.StringIO()
        with batch_progress(total, wanted, Console(file=file, force_terminal=terminal)) as advance:
            advance(done)
        assert file.getvalue() == ""


def test_a_batch_shows_its_progress_on_a_terminal(bundle: Path) -> None:
    """Standard output is the program's own; the bar is on standard error."""
    script = (
        "import sys; from polymoe import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], device='cpu', kv_cache_bytes=1 << 24)\n"
        "print(len(llm.generate([[5]] * 20, SamplingParams(max_tokens=60), 'math')))"
    )
    ours, theirs = pty.openpty()
    try:
        with tempfile.TemporaryFile("w+") as out:
            environment = {**os.environ, "TERM": "xterm"}
            program = zygote.fork(script, str(bundle), out=out.fileno(), error=theirs, environment=environment)
            assert program.wait(120) == 0
            out.seek(0)
            printed = out.read()
        shown = os.read(ours, 1 << 16).decode(errors="replace")  # as much as there is, maybe half a character
    finally:
        os.close(ours)
        os.close(theirs)
    assert printed == "20\n"
    assert "Generating" in shown
    assert "/20" in shown


# --- asyncio


def test_async_streams_share_the_batches_and_end(bundle: Path, llm: LLM) -> None:
    want = [ids(o) for o in llm.generate("ROMEO:", GREEDY, variants=llm.variants)]

    async def last(engine: AsyncLLM, variant: str) -> RequestOutput:
        async for output in engine.generate("ROMEO:", GREEDY, f"mine-{variant}", variant=variant):
            last = output
        return last

    async def main() -> None:
        async with AsyncLLM(bundle, **OPTIONS) as engine:
            assert engine.variants == llm.variants
            outputs = await asyncio.gather(*(last(engine, variant) for variant in engine.variants))
            assert [ids(o) for o in outputs] == want
            assert [o.request_id for o in outputs] == [f"mine-{variant}" for variant in engine.variants]
            assert all(o.finished and o.prompt == "ROMEO:" for o in outputs)

            text = ""
            async for output in engine.generate(CHAT, GREEDY, variant="math", delta=True):
                text += output.outputs[0].text
            assert text == llm.chat(CHAT, GREEDY, "math")[0].outputs[0].text

            async for output in engine.generate([5, 6], LONG, variant="code"):
                if len(ids(output)) > 4:
                    break
            gc.collect()
            await asyncio.sleep(0.5)
            stats = await engine._started.stats()
            assert (sum(stats.running), sum(stats.waiting), engine._processor.num_sequences) == (0, 0, 0)

            nearly_all = [5] * (engine._processor.variant("code").max_model_len - 3)
            outputs = [o async for o in engine.generate(nearly_all, variant="code")]
            assert outputs[-1].finished
            assert len(ids(outputs[-1])) <= 3  # nobody asked for the 16 that are the default

            with pytest.raises(UnknownVariantError):
                await anext(engine.generate("a", variant="poet"))
            with pytest.raises(RequestError, match="a prompt must be"):
                await anext(engine.generate(5, variant="math"))  # type: ignore[arg-type]
        await engine.close()
        with pytest.raises(EngineDeadError):
            await anext(engine.generate("a", GREEDY, variant="math"))

    asyncio.run(main())


def test_async_requests_wait_for_room(bundle: Path) -> None:
    """The server answers 429; a program that asks for a thousand answers wants a thousand."""

    async def main() -> None:
        async with AsyncLLM(bundle, **OPTIONS, max_num_seqs=2, max_waiting=1) as engine:

            async def ask(token: int) -> list[int]:
                outputs = [o async for o in engine.generate([token], GREEDY, variant="code")]
                return outputs[-1].prompt_token_ids

            assert await asyncio.gather(*(ask(i) for i in range(5, 25))) == [[i] for i in range(5, 25)]

    asyncio.run(main())


def test_async_mistakes_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        AsyncLLM("bundle", max_num_seq=1)

    async def main() -> None:
        with pytest.raises(polymoe.PolymoeError, match="not a directory"):
            async with AsyncLLM("/nowhere"):
                pass
        engine = AsyncLLM("/nowhere")
        with pytest.raises(EngineDeadError, match="has not started"):
            _ = engine.variants
        await engine.close()

    asyncio.run(main())


def test_the_documentation_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of docs/python.md, with the demo family in place of the user's."""
    monkeypatch.setenv("POLYMOE_CACHE", str(tmp_path))
    source = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in source.split("```python\n")[1:]]
    assert len(blocks) == 4
    names = {"bundles/mine": bundle, "./base": family_paths()["base"], "./code": family_paths()["code"]}
    for block in blocks:
        for name, path in names.items():
            block = block.replace(f'"{name}"', repr(str(path)))
        (tmp_path / "block.py").write_text(block, encoding="utf-8")
        runpy.run_path(str(tmp_path / "block.py"), run_name="__main__")
