"""`/v1/responses` and `/v1/messages`: a request becomes a chat, and its answer is written as these APIs have it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from fastapi import Request
from starlette.responses import Response

from polymoe.errors import RequestError
from polymoe.server.generate import answer_chat, chat_token_ids
from polymoe.server.messages_answer import MessagesFormat
from polymoe.server.messages_request import CountTokensRequest, MessagesRequest
from polymoe.server.responses_answer import ResponsesFormat
from polymoe.server.responses_request import ResponsesRequest
from polymoe.server.state import ServerState
from polymoe.server.stream import JsonResponse
from polymoe.server.turn_request import TurnRequest


async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """OpenAI's Responses API. Nothing is kept: the request carries the whole conversation."""
    state: ServerState = request.app.state.server
    state.require_ready()
    defaults = state.client.processor.variant(body.model).generation
    with _named(body):
        make_form = partial(ResponsesFormat, given=body, defaults=defaults)
        return await answer_chat(request, body.chat(), "resp", make_form)


async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Anthropic's Messages API."""
    with _named(body):
        return await answer_chat(request, body.chat(), "msg", MessagesFormat)


async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens the prompt of a message has."""
    with _named(body):
        return JsonResponse({"input_tokens": len(await chat_token_ids(request, body.chat()))})


@contextmanager
def _named(body: TurnRequest) -> Iterator[None]:
    """Errors name the fields as this API does."""
    try:
        yield
    except RequestError as error:
        raise body.renamed(error) from error.__cause__
