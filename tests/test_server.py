"""The OpenAI API as clients use it: openai-python against a real server with a real engine behind it."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from polymoe.bundle.fidelity import record_fidelity
from polymoe.bundle.manifest import MANIFEST, Fidelity
from servers import CONTEXT, ThreadServer, engine_config, events, make_bundle

PROMPT = "the quick brown fox"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(make_bundle(tmp_path_factory.mktemp("server")))) as server:
        yield server


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    """Of v1 a bundle says what was predicted and measured, of base nothing."""
    bundle = make_bundle(tmp_path_factory.mktemp("measured"))
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["variants"][1]["predicted_damage"] = 0.02
    manifest["digest"] = ""
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    figures = Fidelity(text="t.txt", tokens=900, kl=0.01, top1=0.97, perplexity_original=5.5, perplexity_served=5.75)
    record_fidelity(bundle, {"v1": figures})
    with ThreadServer(engine_config(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ThreadServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt=PROMPT, max_tokens=7, temperature=0, user="somebody")
    other = client.completions.create(model="v1", prompt=PROMPT, max_tokens=7, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == "base"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.choices[0].text
    assert answer.choices[0].text != other.choices[0].text, "variants must differ"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_batched_prompts_times_n(client: openai.OpenAI, server: ThreadServer) -> None:
    """Choices 0 to n-1 belong to prompt 0, and so on, whatever finishes first."""
    prompts = ["dog", "the lazy dog jumps", "a"]
    options = {"model": "base", "temperature": 0, "max_tokens": 5, "n": 2, "extra_body": {"ignore_eos": True}}
    batch = client.completions.create(prompt=prompts, **options)  # type: ignore[call-overload]
    assert [choice.index for choice in batch.choices] == list(range(6))
    tokens = [server.post("/tokenize", {"model": "base", "prompt": p}).json()["tokens"] for p in prompts]
    as_ids = client.completions.create(prompt=tokens, **options)  # type: ignore[call-overload]
    for p, prompt in enumerate(prompts):
        single = client.completions.create(prompt=prompt, **options).choices[0].text  # type: ignore[call-overload]
        for k in range(2):
            assert batch.choices[2 * p + k].text == as_ids.choices[2 * p + k].text == single
    assert batch.usage.prompt_tokens == sum(len(t) for t in tokens)
    assert batch.usage.completion_tokens == 30


def test_chat_uses_the_variants_own_template(client: openai.OpenAI, server: ThreadServer) -> None:
    for model in ("base", "v1"):
        answer = client.chat.completions.create(model=model, messages=USER, max_completion_tokens=5)  # type: ignore[arg-type]
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        tokens = server.post("/tokenize", {"model": model, "messages": USER}).json()["tokens"]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokens)
        text = server.post("/detokenize", {"model": model, "tokens": tokens}).json()["prompt"]
        assert text.startswith(f"{model}user")
        # What came back can be sent back.
        history = [*USER, answer.choices[0].message.model_dump(), *USER]
        client.chat.completions.create(model=model, messages=history, max_tokens=1)  # type: ignore[arg-type]


def test_chat_without_max_tokens_may_fill_the_context(server: ThreadServer) -> None:
    body = {"model": "base", "messages": USER, "ignore_eos": True, "temperature": 0}
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == CONTEXT


@pytest.mark.parametrize("stop", [None, ["e", "q"], "o"])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, stop: str | list[str] | None) -> None:
    options = {
        "model": "v1", "prompt": PROMPT, "max_tokens": 300, "seed": 3, "stop": stop, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))  # type: ignore[call-overload]
    *chunks, last = chunks
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert not any(letter in whole.choices[0].text for letter in stop or ())
    if stop is not None:
        assert whole.choices[0].finish_reason == "stop"
        assert whole.choices[0].stop_reason in stop


def test_chat_stream(server: ThreadServer) -> None:
    body = {
        "model": "base", "messages": USER, "max_tokens": 4, "n": 2, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for k in range(2):
        first, *rest = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == k]
        assert first["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in rest] == [None, None, None, "length"]
        assert not any("role" in c["delta"] for c in rest)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=USER, max_tokens=9, logprobs=True, top_logprobs=3, temperature=0,  # type: ignore[arg-type]
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 9
    joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode()
    assert joined.replace("</s>", "") == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)


@pytest.mark.parametrize("as_ids", [False, True])
def test_log_likelihoods_of_prompts(server: ThreadServer, as_ids: bool) -> None:
    """What lm-eval's `local-completions` asks: the prompt's logprobs, and (by float equality) whether it is greedy."""
    tokenizer = server.client.processor.require_tokenizer("base", "this test")
    context = tokenizer.encode(PROMPT)
    body = {"model": "base", "prompt": context, "max_tokens": 6, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    generated = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    by_text = {tokenizer.token_text(token): token for token in range(112)}
    greedy = context + [by_text[text] for text in generated["tokens"]]
    prompts = [greedy, [*greedy[:-1], (greedy[-1] + 1) % 100 + 2], context[:1]]
    if not as_ids:  # text need not come back as the tokens it was made of
        prompts = [tokenizer.encode(tokenizer.decode(ids)) for ids in prompts]
    sent = prompts if as_ids else [tokenizer.decode(ids) for ids in prompts]
    answer = server.post("/v1/completions", {**body, "prompt": sent, "max_tokens": 1, "echo": True}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    greedy_flags = []
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        tokens, logprobs, tops, offsets = (choice["logprobs"][name] for name in names)
        assert [len(array) for array in (tokens, logprobs, tops, offsets)] == [len(ids) + 1] * 4
        assert tokens[:-1] == [tokenizer.token_text(token) for token in ids]
        assert (logprobs[0], tops[0]) == (None, None)
        assert all(
            top[token] == logprob for token, logprob, top in zip(tokens[1:], logprobs[1:], tops[1:], strict=True)
        )
        assert all(1 <= len(top) <= 2 for top in tops[1:])
        assert all(choice["text"][o:].startswith(t) for t, o in zip(tokens, offsets, strict=True) if t != "</s>")
        greedy_flags.append([lp == max(top.values()) for lp, top in zip(logprobs[1:], tops[1:], strict=True)])
    if as_ids:
        assert all(greedy_flags[0][len(context) - 1 :])
        assert not greedy_flags[1][-2]
        scores = answer["choices"][0]["logprobs"]["token_logprobs"][len(context) : -1]
        assert scores == pytest.approx(generated["token_logprobs"], abs=1e-4)


def test_echo_of_the_prompt_alone(server: ThreadServer) -> None:
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == PROMPT
    assert answer["usage"]["completion_tokens"] == 0
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]) == PROMPT
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        first, *_ = events(response)
    assert first["choices"] == answer["choices"]


def test_n_samples_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options = {"model": "base", "prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 11, "temperature": 1.5}
    texts = [[c.text for c in client.completions.create(**options).choices] for _ in range(2)]  # type: ignore[call-overload]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_tokens_are_forced_and_forbidden(server: ThreadServer) -> None:
    forced = {"model": "base", "prompt": PROMPT, "max_tokens": 9, "logit_bias": {"1": 100}}
    choice = server.post("/v1/completions", forced).json()
    assert (choice["choices"][0]["finish_reason"], choice["usage"]["completion_tokens"]) == ("stop", 1)
    assert choice["choices"][0]["text"] == ""
    later = server.post("/v1/completions", {**forced, "min_tokens": 4}).json()
    assert later["usage"]["completion_tokens"] > 4
    never = server.post("/v1/completions", {**forced, "ignore_eos": True, "skip_special_tokens": False}).json()
    assert never["choices"][0]["text"] == "</s>" * 9
    stopped = server.post("/v1/completions", {**forced, "logit_bias": {"7": 100}, "stop_token_ids": [7]}).json()
    assert stopped["choices"][0]["stop_reason"] == 7


def test_models(client: openai.OpenAI, server: ThreadServer) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["base", "v1"]
    assert client.models.retrieve("v1") == cards[1]
    card = httpx.get(f"{server.url}/v1/models/base").json()
    assert card["object"] == "model"
    assert card["max_model_len"] == CONTEXT
    assert card["parent"] is None
    assert len(card["version"]) >= 12
    assert card["residency"]["experts_absent"] == 0


def test_fidelity_is_shown_to_clients_and_operators(measured: ThreadServer) -> None:
    base, v1 = httpx.get(f"{measured.url}/v1/models").json()["data"]
    assert (base["predicted_damage"], base["fidelity"]) == (None, None)
    assert v1["predicted_damage"] == v1["fidelity"]["predicted_damage"] == 0.02
    assert (v1["fidelity"]["kl"], v1["fidelity"]["top1"], v1["fidelity"]["text"]) == (0.01, 0.97, "t.txt")
    lines = httpx.get(f"{measured.url}/metrics").text.splitlines()
    shown = dict(line.rsplit(" ", 1) for line in lines if line.startswith(("polymoe:fidelity", "polymoe:predicted")))
    assert {name: float(value) for name, value in shown.items()} == {
        'polymoe:predicted_damage{model_name="v1"}': 0.02,
        'polymoe:fidelity_kl{model_name="v1"}': 0.01,
        'polymoe:fidelity_top1{model_name="v1"}': 0.97,
        'polymoe:fidelity_perplexity_original{model_name="v1"}': 5.5,
        'polymoe:fidelity_perplexity_served{model_name="v1"}': 5.75,
    }


def test_operators_endpoints(server: ThreadServer) -> None:
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 200
    schema = json.dumps(httpx.get(f"{server.url}/openapi.json").json())
    assert "HTTPValidationError" not in schema, "errors have one shape"


def test_metrics(client: openai.OpenAI, server: ThreadServer) -> None:
    def scrape() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    before = scrape()
    answer = client.completions.create(model="v1", prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True})
    after = scrape()
    assert answer.usage is not None
    label = '{model_name="v1"}'
    for name, growth in (
        (f"vllm:prompt_tokens_total{label}", answer.usage.prompt_tokens),
        (f"vllm:generation_tokens_total{label}", 5),
        ('vllm:request_success_total{finished_reason="length",model_name="v1"}', 1),
        (f"vllm:time_to_first_token_seconds_count{label}", 1),
        (f"vllm:inter_token_latency_seconds_count{label}", 4),
        (f"vllm:e2e_request_latency_seconds_count{label}", 1),
        (f"vllm:request_queue_time_seconds_count{label}", 1),
        (f"vllm:request_prefill_time_seconds_count{label}", 1),
        (f"vllm:request_decode_time_seconds_count{label}", 1),
    ):
        assert after[name] - before.get(name, 0) == growth, name
    assert after[f"vllm:num_requests_running{label}"] == 0
    assert after[f"vllm:num_requests_waiting{label}"] == 0
    assert after[f"vllm:kv_cache_usage_perc{label}"] == 0
    assert any(name.startswith("vllm:num_preemptions_total") for name in after)
    assert any(name.startswith("polymoe:resident_bytes") for name in after)
    assert after[f"polymoe:tokens_served_total{label}"] >= answer.usage.total_tokens - 1
    assert after[f"polymoe:deadline_misses_total{label}"] == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_client_that_leaves_ends_its_request(server: ThreadServer, path: str, stream: bool) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": USER}
    body = {"model": "base", "max_tokens": CONTEXT - 100, "n": 4, "ignore_eos": True, "stream": stream, **prompt}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=60) as response:
            arriving = events(response)  # kept: closing the iterator would close the connection
            next(arriving)
            server.wait_for(lambda: sum(server.stats().running) == 4)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/{path}", json=body, timeout=0.3)
    server.wait_for(server.is_idle, timeout=1.0)
    assert 'finished_reason="abort"' in httpx.get(f"{server.url}/metrics").text
