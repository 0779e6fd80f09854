"""Text and chats to token ids, without delaying the tokens of others.

A chat is rendered in a process that can be killed; a long text is tokenized in a thread, which holds no lock of the
interpreter meanwhile and yields to the engine and the event loop where cores are scarce.
"""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from polymoe.client.render_pool import RenderPool
from polymoe.errors import RequestError
from polymoe.protocol.info import VariantInfo
from polymoe.text.chat_template import Message, TemplateSource
from polymoe.text.tokenizer import VariantTokenizer

T = TypeVar("T")
_LONG_TEXT = 4096  # characters, of all texts of a request together; what is shorter takes about a millisecond
_NICENESS = 10
_LARGEST_TEXT = 64 << 20  # characters


class Encoder:
    """All methods belong to one event loop."""

    def __init__(self) -> None:
        self._pool = RenderPool()
        # Few threads: however many long texts there are, half of the cores stay free of them.
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer", initializer=_be_nice)

    async def encode(
        self,
        tokenizer: VariantTokenizer,
        texts: Sequence[str],
        add_special_tokens: bool,
        variant: VariantInfo | None = None,
    ) -> list[list[int]]:
        """Token ids of each text. variant: whose context they must fit, None: they need not fit any.

        Raises `RequestError` for a text that cannot fit, before it is tokenized.
        """
        for text in texts:
            _check_length(tokenizer, text, variant, "prompt")
        if sum(map(len, texts)) <= _LONG_TEXT:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]
        return [await self._beside(tokenizer.encode, text, add_special_tokens) for text in texts]

    async def encode_chat(
        self,
        tokenizer: VariantTokenizer,
        messages: Sequence[Message],
        variables: dict[str, Any] | None,
        variant: VariantInfo | None = None,
    ) -> list[int]:
        """Token ids of a chat, as `VariantTokenizer.encode_chat`. Raises `RequestError`."""
        text = await self._pool.render(tokenizer.require_template(), messages, variables)
        _check_length(tokenizer, text, variant, "messages")
        if len(text) <= _LONG_TEXT:
            return tokenizer.encode_rendered(text)
        return await self._beside(tokenizer.encode_rendered, text)

    async def decode(self, tokenizer: VariantTokenizer, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self._beside(tokenizer.decode, token_ids, False)

    async def token_texts(self, tokenizer: VariantTokenizer, token_ids: list[int]) -> list[str]:
        return await self._beside(lambda: [tokenizer.token_text(token) for token in token_ids])

    async def warm_up(self) -> None:
        """Start what the first chat would wait a second for."""
        with contextlib.suppress(RequestError):
            await self._pool.check(TemplateSource(""))

    async def check_template(self, tokenizer: VariantTokenizer) -> None:
        """Take note of a chat template that is no Jinja."""
        if tokenizer.template_source is not None:
            with contextlib.suppress(RequestError):  # slow or greedy: its requests will be told
                tokenizer.chat_template_fault = await self._pool.check(tokenizer.template_source)

    async def _beside(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def close(self) -> None:
        """End the rendering process; a text that is being tokenized is finished."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._pool.close()


def _check_length(tokenizer: VariantTokenizer, text: str, variant: VariantInfo | None, param: str) -> None:
    most = _LARGEST_TEXT if variant is None else tokenizer.longest_token * variant.max_model_len
    if len(text) > most:
        limit = "" if variant is None else f"This model's maximum context length is {variant.max_model_len} tokens. "
        raise RequestError(
            f"{limit}There are {len(text)} characters in the {param}, and no more than {most} can fit. Please reduce "
            f"the length of the {param}.",
            param=param,
            code="context_length_exceeded",
        )


def _be_nice() -> None:
    """Linux has a priority for each thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
