"""From a client's request to engine requests, and from the engine's tokens back to text.

Synchronous but for what takes long, so that the offline `LLM` class and the server's asyncio client share it.
"""

import asyncio
import contextlib
from collections.abc import KeysView, Sequence
from dataclasses import dataclass, field

from polymoe.client.grammars import GrammarChecks, GrammarSource
from polymoe.client.output_sequence import ClientRequest, CompletionChunk, OutputSequence
from polymoe.client.request_tokens import check_tokens, fitted, token_sampling
from polymoe.client.tokenizers import Tokenizers
from polymoe.client.versions import Versions
from polymoe.errors import (
    BundleError,
    RequestError,
    UnknownVariantError,
    VariantUnusableError,
)
from polymoe.protocol.info import EngineInfo, VariantInfo
from polymoe.protocol.request import (
    EngineRequest,
    QoS,
    RequestOutput,
    SamplingParams,
    SequenceId,
    TokenOutput,
)
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.text.tokenizer import VariantTokenizer

_EQUAL = QoS()  # no more urgent than others


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a variant is not served."""

    reason: str  # for clients
    details: str  # for the operator


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the outputs of one engine step mean for the clients."""

    chunks: list[CompletionChunk] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)
    aborts: list[SequenceId] = field(default_factory=list)  # sequences that nobody waits for any more


class OutputProcessor:
    """Knows every request that is in flight. Not thread-safe. `beside`: another one, whose tokenizers and grammars are
    used too."""

    def __init__(self, info: EngineInfo, beside: "OutputProcessor | None" = None) -> None:
        self.versions = Versions(info.variants, info.names)
        self.faults = {
            variant.key: Fault("its files in the bundle cannot be used", variant.fault)
            for variant in info.variants
            if variant.fault is not None
        }
        self.grammars: GrammarChecks = GrammarChecks() if beside is None else beside.grammars
        self._tokenizers: Tokenizers = Tokenizers() if beside is None else beside._tokenizers
        self._requests: dict[str, dict[int, ClientRequest]] = {}  # request id -> index of a prompt -> its part
        self._sequences: dict[SequenceId, OutputSequence] = {}

    @property
    def num_sequences(self) -> int:
        """Sequences in flight, running or waiting."""
        return len(self._sequences)

    @property
    def open_requests(self) -> KeysView[str]:
        """Ids of the requests in flight."""
        return self._requests.keys()

    @property
    def tokenizers(self) -> list[VariantTokenizer]:
        """Those that are loaded, each once."""
        return self._tokenizers.loaded

    @property
    def variants(self) -> dict[str, VariantInfo]:
        """What each name means."""
        return {variant.name: variant for variant in self.versions.named()}

    @property
    def served(self) -> list[VariantInfo]:
        """What `model` may name, without those that have a fault."""
        return [variant for variant in self.versions.named() if variant.key not in self.faults]

    def variant(self, name: str) -> VariantInfo:
        """The version that a name means now, or that `name@version` names; the first digits of a version do. Raises
        `UnknownVariantError` or `VariantUnusableError`."""
        found = self.versions.find(name)
        if found is None:
            raise UnknownVariantError(name, [variant.name for variant in self.served])
        if (fault := self.faults.get(found.key)) is not None:
            raise VariantUnusableError(found.name, fault.reason) from BundleError(fault.details)
        return found

    async def add_version(self, info: VariantInfo) -> None:
        """A version is there that no name means yet. Its tokenizer is loaded in a thread, while streams go on. Raises
        `BundleError` where it cannot be; the version is not there then."""
        folder = info.tokenizer_dir
        if folder is not None and self._tokenizers.get(folder) is None:
            self._tokenizers.hold(folder, *await asyncio.to_thread(self._tokenizers.load, folder))
        self.versions.hold(info)

    def drop_version(self, info: VariantInfo) -> None:
        """Nobody can ask for it any more; what is in flight goes on."""
        self.versions.drop(info)
        self.faults.pop(info.key, None)
        if info.tokenizer_dir is not None and all(
            held.tokenizer_dir != info.tokenizer_dir for held in self.versions.held.values()
        ):
            self._tokenizers.drop(info.tokenizer_dir)

    def load_tokenizers(self) -> None:
        """Now rather than during the first requests. A tokenizer that cannot be loaded makes its variants unusable;
        raises `BundleError` when no variant is left."""
        for variant in self.versions.named():
            with contextlib.suppress(VariantUnusableError):
                self.tokenizer(variant.key)
        if not self.served:
            raise BundleError("no variant can be served: " + "; ".join(f.details for f in self.faults.values()))

    def tokenizer(self, variant: str) -> VariantTokenizer | None:
        """The variant's tokenizer, loaded at first use; None if the bundle has none.

        Raises `VariantUnusableError` when it cannot be loaded, then and ever after.
        """
        info = self.variant(variant)
        directory = info.tokenizer_dir
        if directory is None:
            return None
        if (found := self._tokenizers.get(directory)) is not None:
            return found
        try:
            return self._tokenizers.hold(directory, *self._tokenizers.load(directory))
        except BundleError as error:
            fault = Fault("its tokenizer cannot be loaded", f"{directory}: {error}")
            self.faults[info.key] = fault
            raise VariantUnusableError(info.name, fault.reason) from error

    def end_token_ids(self, variant: str) -> list[int]:
        """What ends an answer, as `VariantTokenizer.end_token_ids`."""
        info, tokenizer = self.variant(variant), self.tokenizer(variant)
        return info.eos_token_ids if tokenizer is None else tokenizer.end_token_ids(info)

    def grammar_source(self, variant: str, wanted: StructuredOutputsParams) -> GrammarSource:
        """`wanted` with what it takes to check it. Raises `RequestError` for a variant that cannot be constrained."""
        tokenizer = self.require_tokenizer(variant, "a structured output", "structured_outputs")
        info = self.variant(variant)
        ends = self.end_token_ids(variant)
        if not ends:
            raise RequestError(
                f"`{variant}` knows no end token, so that a structured output could not end.",
                param="structured_outputs",
            )
        if tokenizer.largest_token_id >= info.vocab_size:
            raise RequestError(
                f"The tokenizer of `{variant}` knows tokens that the model does not have; structured outputs are not "
                "possible with it.",
                param="structured_outputs",
            )
        assert info.tokenizer_dir is not None
        return GrammarSource(wanted, info.tokenizer_dir, tokenizer, info.vocab_size, tuple(ends))

    def require_tokenizer(self, variant: str, purpose: str, param: str = "prompt") -> VariantTokenizer:
        """Like `tokenizer`, but raises `RequestError` when there is none."""
        tokenizer = self.tokenizer(variant)
        if tokenizer is None:
            raise RequestError(
                f"The model `{variant}` has no tokenizer, which {purpose} needs; send token ids.", param=param
            )
        return tokenizer

    def add_request(
        self,
        request_id: str,
        variant: str,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        prompt_index: int = 0,
        text: str | None = None,
        cache_salt: str = "",
        qos: QoS = _EQUAL,
        arrival_time: float = 0.0,
        fit: bool = False,
        whole: bool = True,
    ) -> list[EngineRequest]:
        """Check a request and take note of it.

        Args:
            prompt: text, or token ids (`text` is then what the output reports as its prompt, if given).
            prompt_index: of a request with several prompts, each given by a call of its own.
            arrival_time: seconds, time.monotonic().
            whole: the result is wanted, and not only what comes step by step.
            fit: nobody asked for `max_tokens`; it is lowered to what the context has room for.

        Returns: the `n` engine requests to add. The engine relies on what is checked here and does not check it again.
        Raises: `RequestError`, and then nothing is noted.
        """
        info = self.variant(variant)
        if prompt_index in self._requests.get(request_id, {}):
            raise RequestError(f"The request id {request_id!r} is in use.", param="request_id")
        if isinstance(prompt, str):
            text = prompt
            token_ids = self.require_tokenizer(variant, "a text prompt").encode(prompt)
        else:
            token_ids = list(prompt)
        if fit:
            sampling = fitted(sampling, info.max_new_tokens(len(token_ids)))
        check_tokens(info, token_ids, sampling)
        start = [] if info.decoder_start_token_id is None else [info.decoder_start_token_id]
        tokenizer = self.require_tokenizer(variant, "stop", "stop") if sampling.stop else self.tokenizer(variant)
        grammar = None
        if sampling.structured_outputs is not None:
            grammar = self.grammars.grammar(self.grammar_source(variant, sampling.structured_outputs))
        banned = self._banned(variant, sampling.bad_words) if sampling.bad_words else []

        stop_ids = [] if sampling.ignore_eos else self.end_token_ids(variant)
        stop_ids = list(dict.fromkeys([*stop_ids, *sampling.stop_token_ids]))
        request = ClientRequest(
            request_id, prompt_index, variant, text, token_ids, start or token_ids, tokenizer, sampling
        )
        engine_requests = []
        for k in range(sampling.n):
            sequence = OutputSequence(request, k, frozenset(stop_ids), whole)
            request.sequences.append(sequence)
            self._sequences[sequence.id] = sequence
            engine_requests.append(
                EngineRequest(
                    request_id=sequence.id,
                    variant=info.place,
                    prompt_token_ids=token_ids + start,
                    num_encoder_tokens=len(token_ids) if start else 0,
                    sampling=token_sampling(sampling, k),
                    stop_token_ids=stop_ids,
                    banned=banned,
                    grammar=grammar,
                    cache_salt=cache_salt,
                    qos=qos,
                    arrival_time=arrival_time,
                )
            )
        self._requests.setdefault(request_id, {})[prompt_index] = request
        return engine_requests

    def _banned(self, variant: str, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word, as its text begins with them and as they follow a space (vLLM's rule)."""
        tokenizer = self.require_tokenizer(variant, "bad_words", "bad_words")
        texts = (text for word in words for text in (word, " " + word.lstrip()))
        rows = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        size = self.variant(variant).vocab_size
        return [list(row) for row in dict.fromkeys(rows) if row and max(row) < size]

    def process(self, outputs: Sequence[TokenOutput]) -> StepOutput:
        """Turn what the engine computed into text. Outputs of sequences that have ended are dropped."""
        step = StepOutput()
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            chunk = sequence.update(output)
            step.chunks.append(chunk)
            if chunk.finish_reason is not None:
                if output.finish_reason is None:  # a stop string: the engine does not know yet
                    step.aborts.append(sequence.id)
                self._end(sequence, step)
        return step

    def abort(self, request_ids: Sequence[str]) -> StepOutput:
        """End requests now, all their prompts, with finish reason "abort"; ids that are not in flight are ignored."""
        step = StepOutput()
        for request_id in request_ids:
            parts = list(self._requests.get(request_id, {}).values())
            for sequence in (sequence for part in parts for sequence in part.sequences):
                if sequence.output.finish_reason is None:
                    step.chunks.append(sequence.finish("abort"))
                    step.aborts.append(sequence.id)
                    self._end(sequence, step)
        return step

    def _end(self, sequence: "OutputSequence", step: StepOutput) -> None:
        request = sequence.request
        del self._sequences[sequence.id]
        if all(other.output.finish_reason is not None for other in request.sequences):
            parts = self._requests[request.request_id]
            del parts[request.prompt_index]
            if not parts:
                del self._requests[request.request_id]
            step.finished.append(request.result())
