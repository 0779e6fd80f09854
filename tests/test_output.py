"""From tokens back to text: tokenizers, incremental detokenization, stop strings, and the bookkeeping of requests."""

import itertools
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from families import make_tokenizer
from polymoe.engine.detokenizer import IncrementalDetokenizer
from polymoe.engine.engine import EngineInfo, VariantInfo
from polymoe.engine.output import OutputProcessor
from polymoe.engine.request import SamplingParams, TokenLogprobs, TokenOutput
from polymoe.engine.stop_strings import StopStrings
from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import BundleError, ContextLengthError, RequestError, UnknownVariantError

TEXTS = [
    "plain words, and  two spaces",
    "naïve café: 東京 ↔ Ελλάδα, ₿ 5 €",
    "family 👩‍👩‍👧‍👦 flag 🇩🇪 end",
    " leading space\nand a line\n\n",
]


def byte_level(folder: Path) -> Path:
    """GPT-2 style: every byte is a letter of an alphabet, rare characters are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["plain words and two spaces, leading words"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def sentencepiece(folder: Path) -> Path:
    """Llama style: `▁` for a space, stripped at the start of a text, and a token for each byte as a last resort."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["▁a", "an", "▁an", "▁and"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("▁an", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VariantTokenizer:
    return VariantTokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_whole_character_by_character(tokenizer: VariantTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) > 6
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).lstrip() == text.lstrip()


def test_a_completion_keeps_the_space_it_starts_with(tokenizer: VariantTokenizer) -> None:
    """Decoding the completion alone would lose it where the tokenizer strips the first space of a text."""
    ids = tokenizer.encode("one and two")
    for cut in range(1, len(ids)):
        detokenizer = tokenizer.detokenizer(ids[:cut], skip_special_tokens=True)
        text = "".join(detokenizer.push(token) for token in ids[cut:]) + detokenizer.flush()
        assert tokenizer.decode(ids[:cut]) + text == "one and two"


def test_random_bytes_lose_nothing(tokenizer: VariantTokenizer) -> None:
    """Untrained models speak invalid UTF-8. What is not valid becomes U+FFFD, what is valid must come through."""
    rng = random.Random(5)
    letters = tokenizer.encode("abcdefgh")
    euro = tokenizer.encode("x€")[-3:]
    for _ in range(30):
        ids = [rng.choice([*letters, *euro]) for _ in range(60)]
        ids += [*letters[-1:], *euro, *letters[-2:]]
        detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text.endswith("h€gh")
        # Of a run of bytes that turns invalid, what was valid until then has been given out; letters are the same.
        assert [c for c in text if c.isascii()] == [c for c in tokenizer.decode(ids) if c.isascii()]


def test_undecodable_tokens_are_not_held_for_ever(tokenizer: VariantTokenizer) -> None:
    """A client can force one byte again and again with logit_bias; decoding all of them each time is quadratic."""
    byte = tokenizer.encode("x€")[-2]
    longest = 0

    def decode(ids: object) -> str:
        nonlocal longest
        longest = max(longest, len(ids))  # type: ignore[arg-type]
        return tokenizer.decode(ids)  # type: ignore[arg-type]

    detokenizer = IncrementalDetokenizer(decode)
    text = "".join(detokenizer.push(byte) for _ in range(500)) + detokenizer.flush()
    assert set(text) == {"\ufffd"}
    assert longest < 50


def test_special_tokens_are_skipped_or_shown(tokenizer: VariantTokenizer) -> None:
    bos, a = tokenizer.encode("<s>")[-1], tokenizer.encode("a")[-1]
    for skip, expected in ((True, "aa"), (False, "a<s>a")):
        detokenizer = tokenizer.detokenizer([a], skip)
        text = "".join(detokenizer.push(token) for token in [a, *[bos] * (1 if not skip else 40), a])
        assert text.replace(" ", "") == expected


def test_bytes_of_tokens_join_to_the_text(tokenizer: VariantTokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token) for token in ids).decode().lstrip() == text.lstrip()
    half = tokenizer.encode("x€")[-1]
    assert tokenizer.token_text(half) == "bytes:\\xac"


def test_encoding_is_that_of_transformers(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = VariantTokenizer(tmp_path)
    for text in ("the quick brown fox", "", "dog </s> dog"):
        assert ours.encode(text) == reference(text)["input_ids"]
    with pytest.raises(RequestError, match="Unicode"):
        ours.encode("a\ud800")


def test_chat_template_writes_its_special_tokens_once(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    fast = AutoTokenizer.from_pretrained(tokenizer)
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    fast.save_pretrained(tmp_path)
    chat = VariantTokenizer(tmp_path)
    ids = chat.encode_chat([{"role": "user", "content": "and"}])
    assert ids.count(1) == 1
    assert ids[0] == 1
    with pytest.raises(RequestError, match="no system role") as refused:
        chat.encode_chat([{"role": "system", "content": "x"}])
    assert refused.value.param == "messages"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be loaded"):
        VariantTokenizer(tmp_path)
    make_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["x.Y", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="remote code"):
        VariantTokenizer(tmp_path)


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

    def variant(name: str, folder: str | None) -> VariantInfo:
        return VariantInfo(
            name=name, version="1", max_model_len=32, vocab_size=112, root="", created=0, tokenizer_dir=folder,
            eos_token_ids=[1], generation={},
        )  # fmt: skip

    info = EngineInfo(
        variants=[variant("a", str(tmp_path)), variant("b", None)], policy="separate", resident_bytes={}, slots=2,
        num_kv_blocks=8, block_size=4, experts_resident=1, experts_absent=0, max_concurrency=1.0, device="cpu",
        dtype="float32",
    )  # fmt: skip
    return OutputProcessor(info)


def outputs_of(request_id: str, ids: list[int], finish_reason: str | None = None, **more: object) -> list[TokenOutput]:
    """One token a step; the last one carries the reason."""
    reasons = [None] * (len(ids) - 1) + [finish_reason]
    return [
        TokenOutput(request_id=request_id, new_token_ids=[token], finish_reason=reason, **more)  # type: ignore[arg-type]
        for token, reason in zip(ids, reasons, strict=True)
    ]


def test_a_stop_string_ends_the_request_and_aborts_in_the_engine(processor: OutputProcessor) -> None:
    ids = processor.require_tokenizer("a", "this test").encode("the quick dog jumps")
    processor.add_request("r", "a", "fox", SamplingParams(stop=["k d"], max_tokens=20))
    steps = [processor.process([output]) for output in outputs_of("r-0", ids)]
    finished = [step for step in steps if step.finished]
    assert len(finished) == 1
    assert finished[0].aborts == ["r-0"]
    output = finished[0].finished[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("the quic", "stop", "k d")
    assert "".join(delta.text for step in steps for delta in step.deltas) == output.text
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
        last = TokenOutput(request_id="r-0", new_token_ids=[dog, fox], finish_reason="stop", stop_reason=fox)
        output = processor.process([last]).finished[0].outputs[0]
        assert (output.text, output.token_ids, output.stop_reason) == (text, [dog, fox], fox)


def test_n_sequences_differ_by_seed_and_end_one_by_one(processor: OutputProcessor) -> None:
    sampling = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1, ignore_eos=True)
    requests = processor.add_request("r", "b", [5, 6], sampling, cache_salt="tenant")
    assert [r.request_id for r in requests] == ["r-0", "r-1", "r-2"]
    assert [r.sampling.seed for r in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [r.sampling.prompt_logprobs for r in requests] == [1, None, None]
    assert {(r.variant, r.cache_salt, r.sampling.n, *r.stop_token_ids) for r in requests} == {(1, "tenant", 1)}
    steps = [processor.process(outputs_of(f"r-{k}", [k + 7], "length")) for k in (1, 2, 0)]
    assert [len(step.finished) for step in steps] == [0, 0, 1]
    outputs = steps[-1].finished[0].outputs
    assert [(o.index, o.token_ids, o.text) for o in outputs] == [(0, [7], ""), (1, [8], ""), (2, [9], "")]


def test_logprobs_in_vllms_form(processor: OutputProcessor) -> None:
    entry = TokenLogprobs([7, 9, 7, 8], [-2.0, -0.5, -2.0, -3.0], 2)
    processor.add_request("r", "a", [5, 6], SamplingParams(logprobs=2, prompt_logprobs=0, max_tokens=1))
    output = processor.process(
        outputs_of("r-0", [7], "length", logprobs=[entry], prompt_logprobs=[entry], num_cached_tokens=1)
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
        ("a", [5] * 17, SamplingParams(max_tokens=16), ContextLengthError, "messages"),
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
    processor.process(outputs_of("r-0", processor.require_tokenizer("a", "").encode("z"), "length"))
    processor.process(outputs_of("r-1", processor.require_tokenizer("a", "").encode("dogz")))
    step = processor.abort(["r", "unknown"])
    assert step.aborts == ["r-1"]
    assert [o.finish_reason for o in step.finished[0].outputs] == ["length", "abort"]
    assert [o.text for o in step.finished[0].outputs] == ["z", "dogz"]
    late = processor.process(outputs_of("r-1", [5]))
    assert not late.deltas
    assert processor.num_sequences == 0
