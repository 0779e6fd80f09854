"""From requests to engine requests, and from tokens back to text: stop strings, logprobs, the bookkeeping of both."""

import itertools
import random
from pathlib import Path

import pytest

from families import make_tokenizer
from polymoe.client.output import OutputProcessor
from polymoe.client.stop_strings import StopStrings
from polymoe.errors import ContextLengthError, RequestError, UnknownVariantError
from polymoe.protocol.info import EngineInfo, VariantInfo
from polymoe.protocol.request import SamplingParams, SequenceId, TokenLogprobs, TokenOutput, TokenSampling


def reference_stop(text: str, stops: list[str], include: bool, floor: int) -> tuple[str, str | None]:
    """Character by character, from the definition."""
    for end in range(floor + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def test_stop_strings_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    found = 0
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 24)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        include, ignored = rng.random() < 0.5, rng.randrange(0, 3)
        cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(6))})
        pieces = [text[i:j] for i, j in itertools.pairwise(cuts)]
        floor = sum(len(piece) for piece in pieces[:ignored])
        expected, expected_stop = reference_stop(text, stops, include, floor)

        finder = StopStrings(stops, include)
        given, stop = "", None
        for number, piece in enumerate(pieces):
            new, stop = finder.push(piece, may_stop=number >= ignored)
            given += new
            assert expected.startswith(given), "what was given out cannot be taken back"
            if stop is not None:
                break
        else:
            given += finder.flush()
        assert (given, stop) == (expected, expected_stop), (pieces, stops, include, ignored)
        found += stop is not None
    assert 1000 < found < 3000


def test_only_a_possible_start_of_a_stop_string_is_held() -> None:
    finder = StopStrings(["\n\nQ"], include=False)
    assert finder.push("abc") == ("abc", None)
    assert finder.push("d\n") == ("d", None)
    assert finder.push("e") == ("\ne", None)
    assert finder.push("\n\n") == ("", None)
    assert finder.push("Quote") == ("", "\n\nQ")


@pytest.fixture
def processor(tmp_path: Path) -> OutputProcessor:
    """Two variants, one with a tokenizer."""
    make_tokenizer(tmp_path)

    def variant(name: str, folder: str | None, place: int) -> VariantInfo:
        return VariantInfo(
            name=name, version="1", max_model_len=32, vocab_size=112, root="", created=0, tokenizer_dir=folder,
            eos_token_ids=[1], generation={}, place=place,
        )  # fmt: skip

    info = EngineInfo(
        variants=[variant("a", str(tmp_path), 0), variant("b", None, 1)], policy="separate", resident_bytes={}, slots=2,
        num_kv_blocks=8, block_size=4, experts_resident=1, experts_absent=0, max_concurrency=1.0, device="cpu",
        dtype="float32",
    )  # fmt: skip
    return OutputProcessor(info)


def outputs_of(
    request_id: SequenceId, ids: list[int], finish_reason: str | None = None, **more: object
) -> list[TokenOutput]:
    """One token a step; the last one carries the reason."""
    reasons = [None] * (len(ids) - 1) + [finish_reason]
    return [
        TokenOutput(request_id=request_id, new_token_ids=[token], finish_reason=reason, **more)  # type: ignore[arg-type]
        for token, reason in zip(ids, reasons, strict=True)
    ]


def test_a_stop_string_ends_the_request_and_aborts_in_the_engine(processor: OutputProcessor) -> None:
    ids = processor.require_tokenizer("a", "this test").encode("the quick dog jumps")
    processor.add_request("r", "a", "fox", SamplingParams(stop=["k d"], max_tokens=20))
    steps = [processor.process([output]) for output in outputs_of(SequenceId("r", 0, 0), ids)]
    finished = [step for step in steps if step.finished]
    assert len(finished) == 1
    assert finished[0].aborts == [SequenceId("r", 0, 0)]
    output = finished[0].finished[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("the quic", "stop", "k d")
    assert "".join(chunk.text for step in steps for chunk in step.chunks) == output.text
    assert output.token_ids == ids[: len(output.token_ids)]
    assert len(output.token_ids) < len(ids)
    assert processor.num_sequences == 0


def test_the_text_of_a_stop_token_is_left_out(processor: OutputProcessor) -> None:
    tokenizer = processor.require_tokenizer("a", "this test")
    dog, fox = tokenizer.encode("d")[0], tokenizer.encode("f")[0]
    for include, text in ((False, "d"), (True, "df")):
        sampling = SamplingParams(stop_token_ids=[fox], include_stop_str_in_output=include)
        (request,) = processor.add_request("r", "a", [5], sampling)
        assert request.stop_token_ids == [1, fox]
        last = TokenOutput(
            request_id=SequenceId("r", 0, 0), new_token_ids=[dog, fox], finish_reason="stop", stop_reason=fox
        )
        output = processor.process([last]).finished[0].outputs[0]
        assert (output.text, output.token_ids, output.stop_reason) == (text, [dog, fox], fox)


def test_n_sequences_differ_by_seed_and_end_one_by_one(processor: OutputProcessor) -> None:
    sampling = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1, ignore_eos=True)
    requests = processor.add_request("r", "b", [5, 6], sampling, cache_salt="tenant")
    assert [r.request_id for r in requests] == [SequenceId("r", 0, 0), SequenceId("r", 0, 1), SequenceId("r", 0, 2)]
    assert [r.sampling.seed for r in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [r.sampling.prompt_logprobs for r in requests] == [1, None, None]
    assert {(r.variant, r.cache_salt, *r.stop_token_ids) for r in requests} == {(1, "tenant")}
    assert {type(r.sampling) for r in requests} == {TokenSampling}  # one sequence each: there is no n
    steps = [processor.process(outputs_of(SequenceId("r", 0, k), [k + 7], "length")) for k in (1, 2, 0)]
    assert [len(step.finished) for step in steps] == [0, 0, 1]
    outputs = steps[-1].finished[0].outputs
    assert [(o.index, o.token_ids, o.text) for o in outputs] == [(0, [7], ""), (1, [8], ""), (2, [9], "")]


def test_logprobs_in_vllms_form(processor: OutputProcessor) -> None:
    entry = TokenLogprobs([7, 9, 7, 8], [-2.0, -0.5, -2.0, -3.0], 2)
    processor.add_request("r", "a", [5, 6], SamplingParams(logprobs=2, prompt_logprobs=0, max_tokens=1))
    output = processor.process(
        outputs_of(SequenceId("r", 0, 0), [7], "length", logprobs=[entry], prompt_logprobs=[entry], num_cached_tokens=1)
    ).finished[0]
    assert output.num_cached_tokens == 1
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1] or {}) == [7]
    assert output.outputs[0].logprobs is not None
    (found,) = output.outputs[0].logprobs
    assert [(token, p.logprob, p.rank) for token, p in found.items()] == [(7, -2.0, 2), (9, -0.5, 1)]


@pytest.mark.parametrize(
    ("variant", "prompt", "sampling", "error", "param"),
    [
        ("c", [5], SamplingParams(), UnknownVariantError, "model"),
        ("a", [], SamplingParams(), RequestError, "prompt"),
        ("a", "", SamplingParams(), RequestError, "prompt"),
        ("a", [112], SamplingParams(), RequestError, "prompt"),
        ("a", [-1], SamplingParams(), RequestError, "prompt"),
        ("b", "text", SamplingParams(), RequestError, "prompt"),
        ("b", [5], SamplingParams(stop=["x"]), RequestError, "stop"),
        ("a", [5] * 17, SamplingParams(max_tokens=16), ContextLengthError, "prompt"),
        ("a", [5], SamplingParams(stop_token_ids=[112]), RequestError, "stop_token_ids"),
        ("a", [5], SamplingParams(logit_bias={112: 1.0}), RequestError, "logit_bias"),
    ],
)
def test_wrong_requests_leave_nothing(
    processor: OutputProcessor,
    variant: str,
    prompt: str | list[int],
    sampling: SamplingParams,
    error: type[RequestError],
    param: str,
) -> None:
    with pytest.raises(error) as raised:
        processor.add_request("r", variant, prompt, sampling)
    assert raised.value.param == param
    assert processor.num_sequences == 0
    processor.add_request("r", "a", [5] * 16, SamplingParams(max_tokens=16))


def test_abort_ends_what_still_runs(processor: OutputProcessor) -> None:
    processor.add_request("r", "a", "the fox", SamplingParams(n=2, stop=["zz"]))
    processor.process(outputs_of(SequenceId("r", 0, 0), processor.require_tokenizer("a", "").encode("z"), "length"))
    processor.process(outputs_of(SequenceId("r", 0, 1), processor.require_tokenizer("a", "").encode("dogz")))
    step = processor.abort(["r", "unknown"])
    assert step.aborts == [SequenceId("r", 0, 1)]
    assert [o.finish_reason for o in step.finished[0].outputs] == ["length", "abort"]
    assert [o.text for o in step.finished[0].outputs] == ["z", "dogz"]
    late = processor.process(outputs_of(SequenceId("r", 0, 1), [5]))
    assert not late.chunks
    assert processor.num_sequences == 0


@pytest.mark.parametrize("seed", [-2, -5, -64, 0, 2**63 - 1, -(2**63)])
def test_none_of_n_sequences_loses_its_seed(processor: OutputProcessor, seed: int) -> None:
    """-1 means "no seed", and the sequences of a request count up from its seed: the second of -2 would have none."""
    requests = processor.add_request("r", next(iter(processor.variants)), [5], SamplingParams(seed=seed, n=64))
    seeds = [request.sampling.seed for request in requests]
    assert None not in seeds
    assert len(set(seeds)) == 64
    assert seeds[0] == seed


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
