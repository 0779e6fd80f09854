"""The grammars of requests, compiled beside the engine's thread."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from polymoe.errors import BundleError
from polymoe.protocol.info import VariantInfo
from polymoe.text.grammar import llguidance_tokenizer, parser_limits
from polymoe.text.tokenizer import VariantTokenizer

_REMEMBERED = 64


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar with the tokens of a variant. It stays as it is; every sequence has a copy that moves on."""

    _matcher: LLMatcher | None  # None: there was no way to compile it

    def start(self) -> LLMatcher | None:
        """A matcher at the beginning of an answer."""
        return None if self._matcher is None else self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles in threads of its own, and remembers what was asked for last.

    Args: variants: by place, as they are now. vocab_size: the largest of all variants; the width of all masks.
    """

    def __init__(self, variants: Mapping[int, VariantInfo], vocab_size: int) -> None:
        self._variants, self._vocab_size = variants, vocab_size
        self._tokenizers: dict[tuple[str, tuple[int, ...]], LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[str, str], Future[CompiledGrammar]] = OrderedDict()
        self._threads = ThreadPoolExecutor(1, "grammar")

    def compile(self, variant: int, grammar: str) -> "Future[CompiledGrammar]":
        """Returns at once; the future never raises."""
        info = self._variants[variant]
        key = (info.version, grammar)
        if key not in self._compiled:
            self._compiled[key] = self._threads.submit(self._compile, info, grammar)
        self._compiled.move_to_end(key)
        while len(self._compiled) > _REMEMBERED:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def forget(self, info: VariantInfo) -> None:
        """The variant is gone, and so are its files."""
        self._tokenizers = {key: found for key, found in self._tokenizers.items() if key[0] != info.tokenizer_dir}

    def _compile(self, info: VariantInfo, grammar: str) -> CompiledGrammar:
        try:
            tokenizer = self._tokenizer(info)
        except BundleError:
            return CompiledGrammar(None)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        return CompiledGrammar(None if matcher.is_error() else matcher)

    def _tokenizer(self, info: VariantInfo) -> LLTokenizer:
        """Variants often share one. Raises `BundleError`."""
        if info.tokenizer_dir is None:
            raise BundleError(f"{info.name} has no tokenizer")
        key = (info.tokenizer_dir, tuple(info.eos_token_ids))
        if key not in self._tokenizers:
            tokenizer = VariantTokenizer(info.tokenizer_dir)
            ends = tokenizer.end_token_ids(info)
            self._tokenizers[key] = llguidance_tokenizer(tokenizer, self._vocab_size, ends)
        return self._tokenizers[key]
