"""The grammars of requests, checked before the engine sees them."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import msgspec
from llguidance import LLTokenizer

from polymoe.errors import BundleError, RequestError
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.text.grammar import check_grammar, grammar_text, llguidance_tokenizer
from polymoe.text.tokenizer import VariantTokenizer

_REMEMBERED = 256  # programs send the same schema again and again
_MAX_SECONDS = 10.0
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class GrammarSource:
    """What an answer has to look like, and the tokens that it is written in."""

    wanted: StructuredOutputsParams
    directory: str  # of the tokenizer
    tokenizer: VariantTokenizer
    vocab_size: int
    end_token_ids: tuple[int, ...]

    @property
    def key(self) -> tuple[str, tuple[int, ...], bytes]:
        """What is equal is checked once. Only a grammar can name special tokens, which are the tokenizer's own."""
        named = self.wanted.grammar is not None
        return self.directory if named else "", self.end_token_ids if named else (), _encode(self.wanted)


class GrammarChecks:
    """Remembers what was found out. Thread-safe."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, tuple[int, ...], bytes], str | RequestError] = OrderedDict()
        self._tokenizers: dict[tuple[str, tuple[int, ...]], LLTokenizer] = {}  # those that a grammar was checked with
        self._lock = Lock()
        # Two, so that somebody else's monstrous schema does not keep everybody waiting.
        self._threads = ThreadPoolExecutor(2, "grammar-check")

    def grammar(self, source: GrammarSource) -> str:
        """As the engine reads it. The first time takes up to a second. Raises `RequestError`."""
        key = source.key
        with self._lock:
            found = self._found.get(key)
        if found is None:
            found = self._check(source)
            with self._lock:
                self._found[key] = found
                while len(self._found) > _REMEMBERED:
                    self._found.popitem(last=False)
        if isinstance(found, RequestError):
            raise RequestError(str(found), param=found.param, code=found.code)
        return found

    async def prepare(self, source: GrammarSource) -> None:
        """As `grammar`, beside the event loop; afterwards `grammar` knows the answer."""
        work = self._threads.submit(self.grammar, source)
        try:
            await asyncio.wait_for(asyncio.wrap_future(work), _MAX_SECONDS)
        except TimeoutError as error:
            raise RequestError(
                f"The structured output takes more than {_MAX_SECONDS:.0f} s to compile; make it smaller.",
                param="structured_outputs",
            ) from error

    def _check(self, source: GrammarSource) -> str | RequestError:
        try:
            text = grammar_text(source.wanted)
            check_grammar(text, source.wanted, None if source.wanted.grammar is None else self._tokenizer(source))
        except RequestError as error:
            return error
        return text

    def _tokenizer(self, source: GrammarSource) -> LLTokenizer:
        key = (source.directory, source.end_token_ids)
        if key not in self._tokenizers:
            try:
                self._tokenizers[key] = llguidance_tokenizer(
                    source.tokenizer, source.vocab_size, list(source.end_token_ids)
                )
            except BundleError as error:
                raise RequestError(
                    f"The tokenizer of this variant cannot be used for structured outputs: {error}.",
                    param="structured_outputs",
                ) from error
        return self._tokenizers[key]
