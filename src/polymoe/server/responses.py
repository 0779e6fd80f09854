"""What clients get: the JSON objects of completions and chat completions, whole or as chunks of a stream."""

import time
from collections.abc import Mapping, Sequence

from polymoe.client.interface import Prompt
from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.request import CompletionOutput, Logprob, RequestOutput
from polymoe.server.answers import AnswerFormat, AnswerPart, AnswerReader
from polymoe.server.format import Format, Json, encode_json
from polymoe.server.logprobs import LegacyLogprobs, chat_logprobs, prompt_logprobs_json
from polymoe.server.protocol import ChatCompletionRequest, CompletionRequest
from polymoe.text.tokenizer import VariantTokenizer

Piece = CompletionChunk | CompletionOutput  # a part of a sequence, or all of it
_MARK = "\0 text \0"  # is in no model's name and in no id
PromptLogprobs = Sequence[Mapping[int, Logprob] | None] | None


class ChoicesFormat(Format):
    """Completions and chats: `choices` in one envelope. Ids, time stamps, indices and usage are the same in both."""

    end = b"data: [DONE]\n\n"
    object: str
    chunk_object: str

    def __init__(
        self,
        request_id: str,
        body: CompletionRequest | ChatCompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
    ) -> None:
        self.stream = bool(body.stream)
        self.include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._n = body.n or 1
        self.model = body.model
        self._id = request_id
        self._created = int(time.time())
        self._prompts = prompts
        self._tokenizer = tokenizer
        # A prompt counts once, however many sequences are drawn from it.
        self._prompt_tokens = sum(len(token_ids) for _, token_ids in prompts)
        self._completion_tokens = 0
        self._return_token_ids = bool(body.return_token_ids)
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._only_text = not (self._return_token_ids or self._wants_prompt_logprobs or self._continuous_usage)
        # (index, kind of text) -> the event without its text, which may occur twice in it
        self._frames: dict[tuple[int, str], list[bytes]] = {}
        self._prompted: set[int] = set()  # indices whose prompt has been given
        self._cached_tokens: dict[int, int] = {}  # index of the prompt -> tokens of it found in the prefix cache

    def encoded(self, chunk: CompletionChunk) -> bytes:
        """Nearly all chunks differ in their text only: the rest is encoded once for a choice."""
        if not self._only_text or chunk.finish_reason is not None:
            return super().encoded(chunk)
        return self._framed(chunk, "text", chunk.text)

    def _framed(self, chunk: CompletionChunk, kind: str, text: str) -> bytes:
        """The event for a chunk that has nothing but a text of this kind."""
        p = chunk.prompt_index
        self._count(p, chunk.token_ids, chunk.num_cached_tokens)
        index = self._index(p, chunk.index)
        frame = self._frames.get((index, kind))
        if frame is None:
            event = self.event(self._chunk([self._plain(index, kind, _MARK)]))
            frame = self._frames[index, kind] = event.split(encode_json(_MARK))
        return encode_json(text).join(frame)

    def _plain(self, index: int, kind: str, text: str) -> Json:
        """An entry of `choices` for `_framed`."""
        raise NotImplementedError

    def chunks(self, chunk: CompletionChunk) -> list[Json]:
        p = chunk.prompt_index
        self._count(p, chunk.token_ids, chunk.num_cached_tokens)
        return [self._chunk([self._choice(p, self._index(p, chunk.index), chunk, chunk.prompt_logprobs)])]

    def closing(self) -> list[Json]:
        """The usage, where it was asked for."""
        if not self.include_usage:
            return []
        return [{**self._envelope(self.chunk_object), "choices": [], "usage": self._usage()}]

    def failed(self, error: Json) -> list[Json]:
        return [error]

    def whole(self, results: Mapping[int, RequestOutput]) -> Json:
        choices: dict[int, Json] = {}
        for p, result in results.items():
            for output in result.outputs:
                self._count(p, output.token_ids, result.num_cached_tokens)
                index = self._index(p, output.index)
                choices[index] = self._choice(p, index, output, result.prompt_logprobs)
        ordered = [choices[index] for index in sorted(choices)]
        return {**self._envelope(self.object), "choices": ordered, "usage": self._usage(), **self._extra(results)}

    def _extra(self, results: Mapping[int, RequestOutput]) -> Json:
        """More of the whole answer."""
        del results
        return {}

    def _token_ids(self, p: int, index: int, token_ids: Sequence[int]) -> Json:
        """Of a choice, where they were asked for; those of the prompt once."""
        if not self._return_token_ids:
            return {}
        first = index not in self._prompted
        self._prompted.add(index)
        return {"prompt_token_ids": self._prompts[p][1] if first else None, "token_ids": list(token_ids)}

    def _choice(self, p: int, index: int, piece: Piece, prompt_logprobs: PromptLogprobs) -> Json:
        """An entry of `choices`, for a chunk or for the whole answer."""
        raise NotImplementedError

    def _chunk(self, choices: list[Json]) -> Json:
        chunk: Json = {**self._envelope(self.chunk_object), "choices": choices}
        if self.include_usage:
            chunk["usage"] = self._usage() if self._continuous_usage else None
        return chunk

    def _envelope(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _index(self, p: int, k: int) -> int:
        """Of the choice: those for prompt 0 come first, then those for prompt 1 …"""
        return p * self._n + k

    def _count(self, p: int, token_ids: Sequence[int], cached: int) -> None:
        self._completion_tokens += len(token_ids)
        self._cached_tokens[p] = max(cached, self._cached_tokens.get(p, 0))

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }


class CompletionFormat(ChoicesFormat):
    """`/v1/completions`. With `echo` the first text of a choice starts with the prompt, and so do its logprobs."""

    object = chunk_object = "text_completion"

    def __init__(
        self,
        request_id: str,
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
    ) -> None:
        super().__init__(request_id, body, prompts, tokenizer)
        self._echo = bool(body.echo)
        # echo with max_tokens 0 asks for the prompt alone; the engine makes one token all the same.
        self._prompt_only = self._echo and body.max_tokens == 0
        self._wants_logprobs = body.logprobs is not None
        self._only_text &= not self._echo and not self._wants_logprobs
        self._skip_special = body.skip_special_tokens is not False
        self._logprobs: dict[int, LegacyLogprobs] = {}  # index -> how far its text offsets are
        self._echoed: set[int] = set()  # indices

    def _choice(self, p: int, index: int, piece: Piece, prompt_logprobs: PromptLogprobs) -> Json:
        text, token_ids = piece.text, list(piece.token_ids)
        logprobs: list[Mapping[int, Logprob] | None] = list(piece.logprobs or ())
        if self._prompt_only:
            text, token_ids, logprobs = "", [], []
        if self._echo and index not in self._echoed:
            self._echoed.add(index)
            text = self._prompt_text(p) + text
            token_ids = self._prompts[p][1] + token_ids
            # A prompt of one token has no entry but the first, which is None.
            logprobs = [*(prompt_logprobs or [None]), *logprobs]
        arrays = None
        if self._wants_logprobs:
            form = self._logprobs.setdefault(index, LegacyLogprobs(self._tokenizer, self._skip_special))
            arrays = form.json(token_ids, logprobs)
        choice: Json = {
            **self._plain(index, "text", text),
            "logprobs": arrays,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **self._token_ids(p, index, [] if self._prompt_only else piece.token_ids),
        }
        if self._wants_prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs)
        return choice

    def _plain(self, index: int, kind: str, text: str) -> Json:
        return {"index": index, kind: text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def _count(self, p: int, token_ids: Sequence[int], cached: int) -> None:
        super()._count(p, [] if self._prompt_only else token_ids, cached)

    def _prompt_text(self, p: int) -> str:
        text, token_ids = self._prompts[p]
        if text is None:
            return self._tokenizer.decode(token_ids, self._skip_special) if self._tokenizer else ""
        return text


class ChatFormat(ChoicesFormat):
    """`/v1/chat/completions`. Each choice of a stream opens with a chunk that carries the role."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request_id: str,
        body: ChatCompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
        answers: AnswerFormat,
    ) -> None:
        super().__init__(request_id, body, prompts, tokenizer)
        self._answers = answers
        self._readers: dict[int, AnswerReader] = {}  # by the index of their choice
        self._top = (body.top_logprobs or 0) if body.logprobs else None
        self._only_text &= self._top is None

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": k, "delta": delta, "logprobs": None, "finish_reason": None}])
            | ({"prompt_token_ids": self._prompts[0][1]} if self._return_token_ids and k == 0 else {})
            for k in range(self._n)
        ]

    def _extra(self, results: Mapping[int, RequestOutput]) -> Json:
        extra: Json = {}
        if self._return_token_ids:
            extra["prompt_token_ids"] = self._prompts[0][1]
        if self._wants_prompt_logprobs:
            extra["prompt_logprobs"] = prompt_logprobs_json(results[0].prompt_logprobs)
        return extra

    def _choice(self, p: int, index: int, piece: Piece, prompt_logprobs: PromptLogprobs) -> Json:
        del p, prompt_logprobs  # a chat has one prompt and does not echo it
        reader = self._reader(index)
        part = reader.push(piece.text, last=piece.finish_reason is not None)
        message = self._delta(part) if self.stream else self._message(part)
        logprobs = None
        if self._top is not None:
            logprobs = chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs or [], self._top)
        return {
            "index": index,
            "delta" if self.stream else "message": message,
            "logprobs": logprobs,
            "finish_reason": reader.finish_reason(piece.finish_reason),
            "stop_reason": piece.stop_reason,
            **({"token_ids": list(piece.token_ids)} if self._return_token_ids else {}),
        }

    def encoded(self, chunk: CompletionChunk) -> bytes:
        if self._answers.is_plain or not self._only_text or chunk.finish_reason is not None:
            return super().encoded(chunk)
        part = self._reader(chunk.index).push(chunk.text, last=False)
        if part.calls or (part.content and part.reasoning):
            self._count(0, chunk.token_ids, chunk.num_cached_tokens)
            return self.event(self._chunk([self._entry(chunk.index, part)]))
        return self._framed(chunk, "reasoning" if part.reasoning else "text", part.reasoning or part.content)

    def _plain(self, index: int, kind: str, text: str) -> Json:
        return self._entry(index, AnswerPart(text) if kind == "text" else AnswerPart(reasoning=text))

    def _entry(self, index: int, part: AnswerPart) -> Json:
        """Of `choices`, for a chunk in the middle."""
        return {
            "index": index,
            "delta": self._delta(part),
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def _reader(self, index: int) -> AnswerReader:
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._answers.reader()
        return reader

    def _delta(self, part: AnswerPart) -> Json:
        """`reasoning` has two names, the newer one and the one that clients know; a delta has what is in it."""
        delta: Json = {"content": part.content} if part.content or not (part.reasoning or part.calls) else {}
        if part.reasoning:
            delta |= {"reasoning": part.reasoning, "reasoning_content": part.reasoning}
        return delta | ({"tool_calls": part.calls} if part.calls else {})

    def _message(self, part: AnswerPart) -> Json:
        empty = bool(part.calls) and not part.content
        message: Json = {"role": "assistant", "content": None if empty else part.content, "refusal": None}
        if self._answers.thinks:
            message |= dict.fromkeys(("reasoning", "reasoning_content"), part.reasoning or None)
        if part.calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in part.calls]
        return message
