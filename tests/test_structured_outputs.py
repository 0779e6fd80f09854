"""Answers that follow a schema, an expression or a grammar: what the model would rather say never gets through."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from polymoe import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from polymoe.client.output_sequence import NOTHING_ALLOWED
from polymoe.errors import RequestError
from polymoe.text.grammar import check_grammar, grammar_text
from servers import ThreadServer, engine_config, events, make_bundle

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "the fox"}]


def structured(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def greedy(wanted: StructuredOutputsParams | None = None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 500, **fields}, structured_outputs=wanted)


def text_of(output: RequestOutput, k: int = 0) -> str:
    return output.outputs[k].text


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("structured"), all_bytes=True)


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[LLM]:
    with LLM(str(bundle), device="cpu", num_threads=1, kv_cache_bytes=1 << 24) as llm:
        yield llm


def is_person(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"age", "ok"} and 0 <= found["age"] < 100 and isinstance(found["ok"], bool)


def test_every_kind_in_one_batch_and_free_requests_as_they_were(llm: LLM) -> None:
    free = llm.generate("the fox", greedy(max_tokens=64), ["base", "v1"], use_tqdm=False)
    kinds = [
        None,
        structured(json=PERSON),
        structured(json=json.dumps(PERSON), disable_any_whitespace=True),
        structured(regex=r"[a-c]{4}-[0-9]{2}"),
        structured(choice=["yes", "no", "perhaps"]),
        structured(grammar='root ::= "x" ("y" | root "z")'),
        structured(grammar='start: "a" B\nB: /[0-9]{3}/'),
        structured(json_object=True),
    ]
    pairs = [(kind, variant) for kind in kinds for variant in ("base", "v1")]
    outputs = llm.generate(
        ["the fox"] * len(pairs),
        [greedy(kind, **({} if kind else {"max_tokens": 64})) for kind, _ in pairs],
        [variant for _, variant in pairs],
        use_tqdm=False,
    )
    texts = [text_of(output) for output in outputs]
    assert texts[:2] == [text_of(output) for output in free]
    assert all(is_person(text) for text in texts[2:6])
    assert not any(c.isspace() for text in texts[4:6] for c in text)
    assert all(re.fullmatch(r"[a-c]{4}-[0-9]{2}", text) for text in texts[6:8])
    assert {*texts[8:10]} <= {"yes", "no", "perhaps"}
    assert all(re.fullmatch(r"x+y?z*", text) for text in texts[10:12])
    assert all(re.fullmatch(r"a[0-9]{3}", text) for text in texts[12:14])
    assert all(text.startswith("{") for text in texts[14:])
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs[2:10])


def test_random_draws_choices_and_short_answers(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.5, seed=3, n=8, max_tokens=90, structured_outputs=structured(json=PERSON))
    output = llm.generate("the fox", sampling, "base", use_tqdm=False)[0]
    done = [choice for choice in output.outputs if choice.finish_reason == "stop"]
    assert len(done) > 4
    assert all(is_person(choice.text) for choice in done)
    assert len({choice.text for choice in done}) > 1
    # The answer is complete before `min_tokens`: it ends all the same, and does not end in an error.
    short = greedy(structured(choice=["yes"]), min_tokens=20)
    output = llm.generate("the fox", short, "v1", use_tqdm=False)[0]
    assert text_of(output) == "yes"
    assert output.outputs[0].finish_reason == "stop"
    # With a longer continuation `min_tokens` holds the end back.
    output = llm.generate("the fox", greedy(structured(regex="a*"), min_tokens=9), "v1", use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) >= 9
    output = llm.generate(
        "the fox", greedy(structured(regex="[ab]{9}"), stop=["aab", "bb", "ab", "ba", "aaa"]), "v1", use_tqdm=False
    )[0]
    assert output.outputs[0].stop_reason in ("aab", "bb", "ab", "ba", "aaa")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_and_scheduled_ahead(bundle: Path, asynchronous: bool) -> None:
    """A sequence that gives way keeps its place in its grammar; with a step in flight the last token is waited for."""
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "enable_prefix_caching": False, "max_model_len": 128}
    wanted = [structured(regex=r"([a-z]{3} ){20}"), structured(regex=r"([0-9]{2},){25}"), None, structured(json=PERSON)]
    sampling = [greedy(kind, max_tokens=100, ignore_eos=kind is None) for kind in wanted] * 3
    variants = ["base", "v1"] * 6

    def answers(**more: Any) -> tuple[list[RequestOutput], int]:
        with LLM(str(bundle), **options, **more) as llm:
            outputs = llm.generate(["the quick brown fox"] * 12, sampling, variants, use_tqdm=False)
            return outputs, sum(llm.engine.stats().preemptions)

    alone, none = answers(num_kv_blocks=200, async_scheduling=False)
    pressed, some = answers(num_kv_blocks=20, async_scheduling=asynchronous)
    assert none == 0
    assert some > 0
    assert [text_of(output) for output in pressed] == [text_of(output) for output in alone]
    for output, kind in zip(pressed, wanted * 3, strict=True):
        if kind is not None and kind.regex is not None:
            assert re.fullmatch(kind.regex, text_of(output))


def test_a_grammar_that_goes_wrong_later_is_an_error_not_half_an_answer(llm: LLM) -> None:
    """llguidance allows an end token once its parser has given up, as if the answer were complete."""
    monster = structured(regex="(a?){3000}a{3000}")
    output = llm.generate("the fox", greedy(monster, max_tokens=200), "base", use_tqdm=False)[0]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", NOTHING_ALLOWED)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": {"type": "object", "properties": {"a": {"items": {"type": "strin"}}}}}, "at properties.a.items: "),
        ({"json": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"not": {}}}}}, "at anyOf.1: "),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "127.0.0.1"),
        ({"json": "{"}, "not valid JSON"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"grammar": "start: <|no_such_token|>"}, "special token"),
        ({"regex": "a" * 200_000}, "at most 131072"),
        ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(6000)}}}, "too big"),
    ],
)
def test_what_cannot_be_compiled_says_where(llm: LLM, fields: dict[str, Any], says: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        llm.generate("the fox", greedy(structured(**fields)), "base", use_tqdm=False)
    assert caught.value.param == "structured_outputs"
    assert time.monotonic() - started < 10


def test_what_contradicts_itself_is_refused() -> None:
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"json": {}, "regex": "a"},
        {"choice": []},
        {"choice": [""]},
        {"json_object": False},
    )
    for fields in cases:
        with pytest.raises(RequestError):
            structured(**fields)
    for field, value in {"allowed_token_ids": [1], "bad_words": ["a"], "ignore_eos": True}.items():
        with pytest.raises(RequestError, match=field):
            greedy(structured(regex="a"), **{field: value})


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"name {i}" for i in range(3000)]},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
        {"type": "string", "pattern": "^(.{1,1000}){1,1000}$"},
        {"type": "string", "maxLength": 10_000_000},
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]},
    ],
)
def test_hostile_schemas_take_no_time(schema: dict[str, Any]) -> None:
    started = time.monotonic()
    wanted = structured(json=schema)
    with contextlib.suppress(RequestError):
        check_grammar(grammar_text(wanted), wanted, None)
    assert time.monotonic() - started < 10


def test_tokens_that_are_allowed_and_words_that_are_bad(llm: LLM) -> None:
    output = llm.generate("the fox", greedy(allowed_token_ids=[40, 41], max_tokens=6), "base", use_tqdm=False)[0]
    assert {*output.outputs[0].token_ids} <= {40, 41}
    free = llm.generate("the fox", greedy(max_tokens=12), "base", use_tqdm=False)[0].outputs[0]
    tokenizer = llm.processor.tokenizer("base")
    assert tokenizer is not None
    words = [
        text
        for ids in (free.token_ids[i:j] for i in range(12) for j in (i + 1, i + 2, i + 3))
        if (text := tokenizer.decode(ids)) and "\ufffd" not in text and tokenizer.encode(text, False) == ids
    ]
    assert len(words) > 1
    for word in words:
        other = llm.generate("the fox", greedy(max_tokens=12, bad_words=[word]), "base", use_tqdm=False)[0].outputs[0]
        row = tokenizer.encode(word, add_special_tokens=False)
        assert len(row) < 4
        found = [other.token_ids[i : i + len(row)] for i in range(len(other.token_ids))]
        assert row not in found
        assert other.token_ids != free.token_ids


@pytest.mark.parametrize("asynchronous", [False, True])
def test_bad_words_of_several_tokens(bundle: Path, asynchronous: bool) -> None:
    """With a step in flight only the device knows the token before."""
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "async_scheduling": asynchronous}
    with LLM(str(bundle), kv_cache_bytes=1 << 24, **options) as llm:
        tokenizer = llm.processor.tokenizer("base")
        assert tokenizer is not None
        letters = tokenizer.encode("xz", add_special_tokens=False)
        assert len(letters) == 2
        fields: dict[str, Any] = {"max_tokens": 60, "temperature": 2, "seed": 1, "allowed_token_ids": letters}
        no_words: list[str] = []
        for words in (no_words, ["xz"], ["xzx"], ["xxx", "zzz"]):
            sampling = SamplingParams(**fields, bad_words=words)
            text = text_of(llm.generate("the", sampling, "base", use_tqdm=False)[0])
            assert len(text) == 60
            assert not any(word in text for word in words)
            assert words or ("xz" in text and "zz" in text)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ThreadServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


class Answer(BaseModel):
    age: int
    tags: list[bool]


def test_openai_client_parses_with_pydantic(client: openai.OpenAI) -> None:
    """`parse` sends the schema in strict mode."""
    for variant in ("base", "v1"):
        answer = client.chat.completions.parse(
            model=variant, messages=MESSAGES, response_format=Answer, temperature=1, seed=5, max_tokens=400
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)


def test_openai_client_streams_json(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="v1",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
        temperature=0,
        stream=True,
    )
    assert is_person("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    completion = client.completions.create(
        model="base", prompt="the", temperature=0, extra_body={"structured_outputs": {"choice": ["red", "green"]}}
    )
    assert completion.choices[0].text in ("red", "green")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {}}}},
            "response_format",
        ),
        ({"guided_json": {}}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ],
)
def test_wrong_ones_are_400_and_name_the_field(server: ThreadServer, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {"model": "base", "messages": MESSAGES, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_goes_wrong_is_the_clients_error(server: ThreadServer, stream: bool) -> None:
    """It was a 500, as if the model's weights were damaged."""
    body = {"model": "base", "prompt": "the fox", "max_tokens": 200, "temperature": 0, "stream": stream}
    response = server.post("/v1/completions", {**body, "structured_outputs": {"regex": "(a?){3000}a{3000}"}})
    if stream:
        *_, error, done = events(response)
        assert (error["error"]["code"], done) == ("nothing_allowed", "[DONE]")
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (400, "nothing_allowed")


def test_neighbours_go_on_while_a_schema_compiles(server: ThreadServer, client: openai.OpenAI) -> None:
    """Compiling took the event loop, or the engine's thread, for seconds."""
    big = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    stream = client.completions.create(
        model="base", prompt="the", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    body = {"model": "v1", "prompt": "x", "max_tokens": 3, "structured_outputs": {"json": big}}
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body).status_code))
    thread.start()
    gaps, last = [], time.monotonic()
    for _ in stream:
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    thread.join()
    assert answers == [200]
    assert max(gaps) < 0.5
