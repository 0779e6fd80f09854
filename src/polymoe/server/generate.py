"""`/v1/completions` and `/v1/chat/completions`: check, tokenize, submit, answer."""

from collections.abc import Sequence
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from polymoe.client.interface import Prompt
from polymoe.errors import ContextLengthError, OverloadedError, RequestError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.request import SamplingParams
from polymoe.server.answers import AnswerFormat, answer_format, opened
from polymoe.server.format import Format
from polymoe.server.http_request import http_request_of
from polymoe.server.protocol import ChatCompletionRequest, CompletionRequest
from polymoe.server.request_log import RecordedRequest
from polymoe.server.request_timer import RequestTimer
from polymoe.server.responses import ChatFormat, CompletionFormat
from polymoe.server.state import ServerState
from polymoe.server.stream import EventStream, collect, unless_gone
from polymoe.server.tenants import tenant_of
from polymoe.text.tokenizer import VariantTokenizer

_DEFAULT_MAX_TOKENS = 16  # of completions, as in OpenAI's API; chats may fill the context


async def create_completion(request: Request, body: CompletionRequest) -> Response:
    state: ServerState = request.app.state.server
    state.require_ready()
    processor = state.client.processor
    variant = processor.variant(body.model)
    tokenizer = processor.tokenizer(variant.key)
    if body.echo:
        variant.check_echo()
    if body.echo and body.stream and body.logprobs is not None and (body.n or 1) > 1:
        raise RequestError("echo with logprobs and n > 1 cannot be streamed.", param="stream")
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and max_tokens == 0:
        max_tokens = 1  # left out of the answer
    asked = [n for n in (body.logprobs if body.echo else None, body.prompt_logprobs) if n is not None]
    sampling = body.sampling(
        variant.generation,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(asked, default=None),
    )
    prompts: list[Prompt] = []
    given = body.prompts()
    texts = [prompt for prompt in given if isinstance(prompt, str)]  # all of them or none
    if texts:
        tokenizer = processor.require_tokenizer(variant.key, "a text prompt")
        limit = variant if body.truncate_prompt_tokens is None else None
        encoding = state.encoder.encode(tokenizer, texts, body.add_special_tokens is not False, limit)
        prompts += zip(texts, await unless_gone(request, encoding), strict=True)
    else:
        prompts += [(None, prompt) for prompt in given if not isinstance(prompt, str)]
    if body.truncate_prompt_tokens is not None:
        prompts = [(None, truncated(ids, body, variant, max_tokens)) for _, ids in prompts]
    request_id = http_request_of(request.scope).name_for_engine("cmpl")
    form = CompletionFormat(request_id, body, prompts, tokenizer)
    return await _answer(request, request_id, body, variant, prompts, sampling, form)


async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    return await answer_chat(request, body, "chatcmpl", ChatFormat)


class MakeFormat(Protocol):
    """How a door writes the answer to a chat."""

    def __call__(
        self,
        request_id: str,
        body: ChatCompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
        answers: AnswerFormat,
    ) -> Format: ...


async def answer_chat(request: Request, body: ChatCompletionRequest, prefix: str, make_form: MakeFormat) -> Response:
    """The one way from a chat to its answer, whichever door it came through. prefix: of the answer's id."""
    state: ServerState = request.app.state.server
    state.require_ready()
    processor = state.client.processor
    variant = processor.variant(body.model)
    tokenizer = processor.require_tokenizer(variant.key, "a chat", "messages")
    answers = answer_format(body, tokenizer.template_text, state.settings.tool_parser_of(variant.name))
    token_ids = await _chat_token_ids(request, body, variant, tokenizer)
    answers = opened(answers, tokenizer, token_ids)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    token_ids = truncated(token_ids, body, variant, max_tokens or 1)
    room = variant.max_new_tokens(len(token_ids))
    if max_tokens is None:
        most = variant.generation.get("max_tokens")
        max_tokens = max(1, min(room, most) if isinstance(most, int) else room)
    if max_tokens > room:
        raise ContextLengthError(variant.max_model_len, len(token_ids), max_tokens, param="messages")
    top = body.top_logprobs or 0
    sampling = body.sampling(
        variant.generation,
        max_tokens=max_tokens,
        logprobs=top if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    sampling = answers.constrained(sampling, tokenizer.special_tokens)
    prompts: list[Prompt] = [(None, token_ids)]
    request_id = http_request_of(request.scope).name_for_engine(prefix)
    form = make_form(request_id, body, prompts, tokenizer, answers)
    try:
        return await _answer(request, request_id, body, variant, prompts, sampling, form)
    except RequestError as error:
        if error.param == "prompt":  # what the engine calls so; this client sent messages
            error.param = "messages"
        raise


async def chat_token_ids(request: Request, body: ChatCompletionRequest) -> list[int]:
    """The prompt that a chat becomes."""
    state: ServerState = request.app.state.server
    state.require_ready()
    variant = state.client.processor.variant(body.model)
    tokenizer = state.client.processor.require_tokenizer(variant.key, "a chat", "messages")
    return await _chat_token_ids(request, body, variant, tokenizer)


async def _chat_token_ids(
    request: Request, body: ChatCompletionRequest, variant: VariantInfo, tokenizer: VariantTokenizer
) -> list[int]:
    state: ServerState = request.app.state.server
    messages = [message.for_template() for message in body.messages]
    limit = variant if body.truncate_prompt_tokens is None else None
    encoding = state.encoder.encode_chat(tokenizer, messages, body.template_variables(), limit)
    return await unless_gone(request, encoding)


async def _answer(
    request: Request,
    request_id: str,
    body: CompletionRequest | ChatCompletionRequest,
    variant: VariantInfo,
    prompts: list[Prompt],
    sampling: SamplingParams,
    form: Format,
) -> Response:
    state: ServerState = request.app.state.server
    # The version whose tokenizer made the prompts, whatever the name means by now; unless that is gone.
    model = variant.key if state.client.processor.versions.find(variant.key) else body.model
    if sampling.structured_outputs is not None:
        processor = state.client.processor
        try:
            await processor.grammars.prepare(processor.grammar_source(model, sampling.structured_outputs))
        except RequestError as error:
            if body.structured_outputs is None:
                error.param = "response_format" if body.structure is not None else "tools"
            raise
    tenant, http = tenant_of(request.scope), http_request_of(request.scope)
    http.variant = variant.name
    state.metrics.set_engine(state.client.info)
    salt, qos = body.cache_salt or "", body.qos
    if tenant is not None:
        salt, qos = tenant.salt(salt), tenant.qos(qos)
    lengths = [len(token_ids) for _, token_ids in prompts]
    entry = state.requests.open(
        id=request_id, variant=variant.name, version=variant.version,
        tenant=qos.tenant, kind="chat" if isinstance(body, ChatCompletionRequest) else "completion",
        prompt_tokens=sum(lengths), prompt=_shown(state, model, prompts),
    )  # fmt: skip
    recorded = RecordedRequest(state.requests, entry, http.started)
    begun = False
    try:
        if tenant is not None:
            tenant.begin(sum(lengths))
            begun = True
        stream = await state.client.submit(
            request_id, model, prompts, sampling, cache_salt=salt, qos=qos, whole=not form.stream
        )
    except BaseException as error:
        if tenant is not None and begun:
            tenant.end()
        recorded.close(f"{type(error).__name__}: {error}")
        state.metrics.recent.error(variant.name)
        if isinstance(error, OverloadedError):
            state.metrics.of(variant.name).rejected.inc()
        raise
    # No await between here and the owner of the stream, or a cancellation could leave it open.
    timer = RequestTimer(state.metrics, http, lengths, sampling, recorded, tenant, state.tracer)
    if form.stream:
        return EventStream(stream, form, timer)
    return await collect(request, stream, form, timer)


def truncated(
    token_ids: list[int], body: CompletionRequest | ChatCompletionRequest, variant: VariantInfo, max_tokens: int
) -> list[int]:
    """The last tokens of a prompt, as many as the request says; -1: as many as there is room for."""
    most = body.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == -1:
        most = variant.most_prompt_tokens(max_tokens)
    return token_ids[-most:]


def _shown(state: ServerState, variant: str, prompts: list[Prompt]) -> str | None:
    """The first prompt's text, where the operator wants to see it."""
    if not state.settings.log_prompts:
        return None
    text, token_ids = prompts[0]
    tokenizer = state.client.processor.tokenizer(variant)
    if text is None and tokenizer is not None:
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return text
