"""Stop strings that are special tokens, which the text leaves out, stop all the same."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from polymoe.client.output import OutputProcessor
from polymoe.client.stop_strings import StopStrings
from polymoe.protocol.info import EngineInfo, VariantInfo
from polymoe.protocol.request import SamplingParams, SequenceId, TokenOutput
from test_tokenizer import byte_level, sentencepiece

Piece = tuple[str, bool]  # text, hidden


def reference(pieces: list[Piece], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: a stop string ends the text as soon as it ends the whole text, without cutting a hidden
    piece, or the visible text."""
    letters: list[tuple[str, bool, bool]] = []  # letter, hidden, goes on a hidden piece
    for text, hidden in pieces:
        if not hidden or any(text in stop for stop in stops):
            letters += [(letter, hidden, hidden and i > 0) for i, letter in enumerate(text)]
    for end in range(1, len(letters) + 1):
        whole = "".join(letter for letter, _, _ in letters[:end])
        visible = [i for i in range(end) if not letters[i][1]]
        cuts = end < len(letters) and letters[end][2]
        found = []
        for stop in stops:
            if whole.endswith(stop) and not cuts and not letters[end - len(stop)][2]:
                found.append((end - len(stop), stop))
            if not letters[end - 1][1] and "".join(letters[i][0] for i in visible).endswith(stop):
                found.append((visible[-len(stop)], stop))
        if found:
            start, stop = min(found)
            before = "".join(letters[i][0] for i in visible if i < start)
            return before + (stop if include else ""), stop
    return "".join(letter for letter, hidden, _ in letters if not hidden), None


def test_however_visible_and_hidden_text_follow_each_other() -> None:
    rng = random.Random(4)
    found = 0
    for _ in range(6000):
        pieces = [
            ("".join(rng.choice("ab") for _ in range(rng.randrange(4))), rng.random() < 0.3)
            for _ in range(rng.randrange(1, 9))
        ]
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        include = rng.random() < 0.5
        expected = reference(pieces, stops, include)
        finder = StopStrings(stops, include)
        given, stop = "", None
        for text, hidden in pieces:
            new, stop = finder.push(text, hidden=hidden)
            given += new
            assert expected[0].startswith(given), "what was given out cannot be taken back"
            if stop is not None:
                break
        else:
            given += finder.flush()
        assert (given, stop) == expected, (pieces, stops, include)
        found += stop is not None
    assert 2000 < found < 6000


@pytest.fixture(params=[byte_level, sentencepiece])
def processor(request: pytest.FixtureRequest, tmp_path: Path) -> OutputProcessor:
    fast = AutoTokenizer.from_pretrained(request.param(tmp_path))
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.save_pretrained(tmp_path)
    variant = VariantInfo(
        name="a", version="1", max_model_len=100_000, vocab_size=500, root="", created=0, tokenizer_dir=str(tmp_path),
        eos_token_ids=[], generation={},
    )  # fmt: skip
    info = EngineInfo(
        variants=[variant], policy="separate", resident_bytes={}, slots=1, num_kv_blocks=8, block_size=4,
        experts_resident=1, experts_absent=0, max_concurrency=1.0, device="cpu", dtype="float32",
    )  # fmt: skip
    return OutputProcessor(info)


def run(processor: OutputProcessor, ids: list[int], sampling: SamplingParams) -> tuple[str, str, str | int | None, int]:
    """(text, finish reason, stop reason, number of tokens) of a sequence with these tokens; its chunks join to it."""
    processor.add_request("r", "a", [5], sampling)
    given = ""
    for position, token in enumerate(ids):
        reason = "length" if position == len(ids) - 1 else None
        step = processor.process([TokenOutput(request_id=SequenceId("r"), new_token_ids=[token], finish_reason=reason)])
        given += "".join(chunk.text for chunk in step.chunks)
        if step.finished:
            output = step.finished[0].outputs[0]
            assert given == output.text
            return output.text, str(output.finish_reason), output.stop_reason, len(output.token_ids)
    raise AssertionError("it did not end")


@pytest.mark.parametrize(
    ("text", "stops", "visible", "included"),
    [
        ("a dog<|im_end|> and", ["<|im_end|>"], "a dog", "a dog<|im_end|>"),
        ("a dog\n<|im_start|>user", ["<|im_start|>user"], "a dog\n", "a dog\n<|im_start|>user"),
        ("a dog\n<|im_start|>user", ["\n<|im_start|>"], "a dog", "a dog\n<|im_start|>"),
        ("a<|im_start|>b<|im_end|>c", ["<|im_end|>"], "ab", "ab<|im_end|>"),
        ("do<|im_start|>g and", ["dog"], "", "dog"),
        ("a €<|im_end|>", ["<|im_end|>", "x"], "a €", "a €<|im_end|>"),
    ],
)
def test_a_special_token_in_a_stop_string(
    processor: OutputProcessor, text: str, stops: list[str], visible: str, included: str
) -> None:
    """`"stop": ["<|im_end|>"]` was accepted and did nothing: the text that is searched does not show special tokens."""
    ids = processor.require_tokenizer("a", "this test").encode(text + " more words", add_special_tokens=False)
    for include, expected in ((False, visible), (True, included)):
        sampling = SamplingParams(stop=stops, include_stop_str_in_output=include, max_tokens=9999)
        found, reason, stop, count = run(processor, ids, sampling)
        assert (found.strip(" "), reason, stop) == (expected, "stop", stops[0])
        assert count < len(ids)
    shown = SamplingParams(stop=["more"], skip_special_tokens=False, max_tokens=9999)
    assert run(processor, ids, shown)[0].strip(" ") == text


def test_not_before_the_minimum(processor: OutputProcessor) -> None:
    ids = processor.require_tokenizer("a", "this test").encode("a<|im_end|>b<|im_end|>c", add_special_tokens=False)
    early = SamplingParams(stop=["<|im_end|>"], min_tokens=len(ids) - 2, max_tokens=9999)
    text, reason, stop, count = run(processor, ids, early)
    assert (text.strip(), reason, stop, count) == ("ab", "stop", "<|im_end|>", len(ids) - 1)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stops", [[], ["a"], ["\ufffd\ufffd\ufffd", "an"], ["€a", " and"]])
def test_streamed_text_with_stop_strings_is_the_whole_text_up_to_the_first(
    processor: OutputProcessor, skip: bool, stops: list[str]
) -> None:
    """Text that is held until a run of bytes ends is searched too, also when the sequence ends there."""
    tokenizer = processor.require_tokenizer("a", "this test")
    euro = tokenizer.encode("€ a and an", add_special_tokens=False)
    rng = random.Random(6)
    stopped = 0
    for length in [*range(1, 60), 3000]:
        few = rng.random() < 0.5
        ids = [rng.choice(euro) if few else rng.randrange(tokenizer.largest_token_id + 3) for _ in range(length)]
        sampling = SamplingParams(stop=stops, skip_special_tokens=skip, max_tokens=9999)
        whole = tokenizer.decode([5, *ids], skip)[len(tokenizer.decode([5], skip)) :]
        ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
        text, reason, _, _ = run(processor, ids, sampling)
        assert text == (whole[: min(ends)[1]] if ends else whole)
        assert reason == ("stop" if ends else "length")
        stopped += bool(ends)
    assert not stops or stopped > 5
