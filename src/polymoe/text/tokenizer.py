"""The tokenizer of one variant: text to ids, ids to text, and its chat template."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from polymoe.errors import BundleError, RequestError
from polymoe.protocol.info import VariantInfo
from polymoe.text.byte_detokenizers import ByteFallbackDetokenizer, ByteLevelDetokenizer
from polymoe.text.chat_template import ChatTemplate, Message, TemplateSource
from polymoe.text.control_tokens import split_marked, unmarked
from polymoe.text.detokenizer import Detokenizer, IncrementalDetokenizer

# Ids this far back in the prompt decide whether the first generated token starts with a space.
_CONTEXT_TOKENS = 8
_MANY_TOKENS = 4096
_REMEMBERED_TOKENS = 65536
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Steps of a decoder under which a token's text depends on the run of bytes it is in and on being the first, only.
_LOCAL_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class VariantTokenizer:
    """Reads tokenizer files from a local directory; never runs code that came with them.

    Raises `BundleError` when the directory holds no usable tokenizer.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        from transformers import AutoTokenizer  # here: it takes seconds, in which the server's port is already open

        try:
            for name in ("tokenizer_config.json", "config.json"):
                file = path / name
                if file.is_file() and "auto_map" in json.loads(file.read_text()):
                    raise BundleError(f"{name} of the tokenizer asks for remote code (auto_map), which is never run.")
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except BundleError:
            raise
        except Exception as error:  # files from anywhere: every kind is raised, bare Exception by the Rust tokenizers
            raise BundleError(f"The tokenizer in {path.name!r} cannot be loaded: {error}") from error
        # The Rust tokenizer is called directly: it is several times faster a token, and safe from several threads
        # as long as nobody changes its truncation, which transformers' own __call__ does.
        self._rust: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._rust is not None:
            self._rust.no_truncation()
            self._rust.no_padding()
        self._decoder_steps = self._read_decoder_steps()
        self._to_bytes = self._bytes_function()
        # Asked for every token of every answer, and most of them again and again.
        remember = lru_cache(maxsize=_REMEMBERED_TOKENS)
        self._shown_bytes = {skip: remember(partial(self._bytes_shown, skip)) for skip in (False, True)}
        self._pieces: dict[bool, dict[int, str]] = {False: {}, True: {}}  # by skip_special_tokens
        self._fallback_byte = remember(self._read_fallback_byte)
        self.token_bytes = remember(self._token_bytes)
        self._read_template()

    def _read_template(self) -> None:
        """A template that cannot be used takes nothing from plain completions. It is not run, nor even parsed, here:
        see `chat_template`."""
        self.template_source: TemplateSource | None = None
        self.chat_template_fault: str | None = None
        if not self._tokenizer.chat_template:
            return
        try:
            jinja = self._tokenizer.get_chat_template()
        except (ValueError, TypeError) as error:  # several templates and none for chats
            self.chat_template_fault = str(error)
            return
        added = {token.content: bool(token.special) for token in self._tokenizer.added_tokens_decoder.values()}
        self.template_source = TemplateSource(jinja, dict(self._tokenizer.special_tokens_map), added)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """For programs that render in their own process. None, and then perhaps a `chat_template_fault`, without a
        template that can be used."""
        if self.template_source is None:
            return None
        try:
            return ChatTemplate(self.template_source)
        except BundleError as error:  # not Jinja
            self.chat_template_fault = str(error)
            return None

    @property
    def has_chat_template(self) -> bool:
        """Whether there is one; what it is good for shows when it is first used."""
        return self.template_source is not None and self.chat_template_fault is None

    def require_template(self) -> TemplateSource:
        """Raises `RequestError` when there is no template, or none that can be used."""
        if self.template_source is None or self.chat_template_fault is not None:
            broken = self.chat_template_fault is not None
            why = "The chat template of this variant cannot be used" if broken else "This variant has no chat template"
            raise RequestError(f"{why}; use /v1/completions with a plain prompt.", param="messages")
        return self.template_source

    @property
    def eos_token_id(self) -> int | None:
        """Of the tokenizer's own `eos_token`."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def end_token_ids(self, info: VariantInfo) -> list[int]:
        """What ends an answer of a variant: the end tokens of its configs and the tokenizer's own, as in vLLM. A chat
        fine-tune often says its new end token only in one of them."""
        own = self.eos_token_id
        known = [] if own is None or own >= info.vocab_size else [own]
        return list(dict.fromkeys([*info.eos_token_ids, *known]))

    def to_json(self) -> str | None:
        """All of it, as the Rust tokenizers read it; None if it is none of them."""
        return None if self._rust is None else str(self._rust.to_str())

    @property
    def largest_token_id(self) -> int:
        """The last id that encoding can give."""
        return max(self._tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of this many times n is at least about n tokens."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` what the model expects around a prompt (often a first BOS).

        Other threads of Python go on meanwhile. Raises `RequestError` for text that is not valid Unicode, or that the
        tokenizer fails on.
        """
        try:
            if self._rust is not None:
                # `encode` would hold the interpreter's lock, and keep the places of all tokens in the text besides.
                (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                ids = encoding.ids
            else:
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError) as error:
            raise RequestError("The text is not valid Unicode (lone surrogates).", param="prompt") from error
        except BaseException as error:
            if isinstance(error, Exception) or _is_panic(error):
                raise RequestError("The tokenizer of this variant fails on this text.", param="prompt") from error
            raise
        return list(ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids the tokenizer does not know (a padded vocabulary) give no text."""
        if self._rust is not None and len(token_ids) > _MANY_TOKENS:  # a batch does not hold the interpreter's lock
            return str(self._rust.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0])
        if self._rust is not None:
            return str(self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        # Without the clean-up of spaces the text of a prefix stays a prefix of the text.
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def render_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """`messages` through the variant's own chat template, as `ChatTemplate.render`, in this process. Raises
        `RequestError`, also when there is no template."""
        return unmarked(self.render_marked(messages, variables))

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of the rendered chat."""
        return self.encode_rendered(self.render_marked(messages, variables))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what `ChatTemplate.render` gave. The template writes its special tokens itself, so none are
        added again; those that a message spells out are encoded as text."""
        first, *others = split_marked(text)
        ids = self.encode(first, add_special_tokens=False)
        for piece in others:
            ids += self._encode_within(piece)
        return ids

    def _encode_within(self, piece: str) -> list[int]:
        """Of a text that goes on. Sentencepiece puts a space before the first word, so that is a line's end here."""
        line, ids = self._line_break, self.encode("\n" + piece, add_special_tokens=False)
        return ids[len(line) :] if ids[: len(line)] == line else self.encode(piece, add_special_tokens=False)

    @cached_property
    def _line_break(self) -> list[int]:
        return self.encode("\n", add_special_tokens=False)

    def render_marked(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """As `ChatTemplate.render`, for `encode_rendered`."""
        template = self.chat_template
        if template is None:
            self.require_template()
        assert template is not None
        return template.render(messages, variables)

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for what follows this prompt. Its pieces join to what `decode` gives for all ids at once."""

        def decode(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special_tokens)

        def has_text(token_id: int) -> bool:
            return self._has_text(token_id, skip_special_tokens)

        context = [token_id for token_id in prompt_token_ids[-_CONTEXT_TOKENS:] if has_text(token_id)]
        if self._decoder_steps == ["ByteLevel"]:
            return ByteLevelDetokenizer(self._shown_bytes[skip_special_tokens], context)
        if "ByteFallback" in self._decoder_steps and set(self._decoder_steps) <= _LOCAL_STEPS:
            return ByteFallbackDetokenizer(
                decode, self._fallback_byte, has_text, context, self._pieces[skip_special_tokens]
            )
        return IncrementalDetokenizer(decode, context)

    def _bytes_shown(self, skip_special_tokens: bool, token_id: int) -> bytes:
        return self._to_bytes(token_id) if self._has_text(token_id, skip_special_tokens) else b""

    def _has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        """False for what decoding leaves out: special tokens that are skipped, ids that the tokenizer does not know."""
        if skip_special_tokens and token_id in self._special_ids:
            return False
        return self._rust is None or self._rust.id_to_token(token_id) is not None

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special token -> id."""
        return {self._added[index]: index for index in self._special_ids}

    @property
    def template_text(self) -> str:
        """The chat template's source; empty without one."""
        return "" if self.template_source is None else self.template_source.jinja

    def special_text(self, token_id: int) -> str | None:
        """The content of a special token, None for any other."""
        return self._added[token_id] if token_id in self._special_ids else None

    def _read_fallback_byte(self, token_id: int) -> int | None:
        found = _BYTE_TOKEN.fullmatch(self._rust.id_to_token(token_id) or "")
        return None if found is None else int(found[1], 16)

    def token_text(self, token_id: int) -> str:
        """The token alone, spaces kept; bytes that are no valid UTF-8 by themselves are written `bytes:\\xe2\\x82`
        (the form OpenAI uses), so that different tokens never look the same."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added).encode()
        return self._to_bytes(token_id)

    def _bytes_function(self) -> Callable[[int], bytes]:
        """How a token becomes bytes depends on the decoder: byte-level BPE writes each byte as one letter of an
        alphabet, sentencepiece writes spaces as `▁` and rare bytes as `<0xE2>`."""
        added: Mapping[int, Any] = self._tokenizer.added_tokens_decoder
        self._added = {index: token.content for index, token in added.items()}
        self._special_ids = {index for index, token in added.items() if token.special}

        def plain(token_id: int) -> bytes:
            return self.decode([token_id], skip_special_tokens=False).encode()

        if "ByteLevel" in self._decoder_steps:
            alphabet = _byte_level_alphabet()

            def byte_level(token_id: int) -> bytes:
                token = self._rust.id_to_token(token_id) or ""
                if all(letter in alphabet for letter in token):
                    return bytes(alphabet[letter] for letter in token)
                return str(token).encode()

            return byte_level
        if self._decoder_steps and "▁" in self._rust.decoder.__getstate__().decode():

            def pieces(token_id: int) -> bytes:
                byte = self._fallback_byte(token_id)
                if byte is not None:
                    return bytes([byte])
                return str(self._rust.id_to_token(token_id) or "").replace("▁", " ").encode()

            return pieces
        return plain

    def _read_decoder_steps(self) -> list[str]:
        """Kinds of the decoder's steps, as tokenizer.json names them; empty without a Rust tokenizer or a decoder."""
        if self._rust is None or self._rust.decoder is None:
            return []
        state = json.loads(self._rust.decoder.__getstate__())
        return [step["type"] for step in state.get("decoders", [state])]


def _is_panic(error: BaseException) -> bool:
    """A failed assertion in Rust is no `Exception`."""
    return type(error).__name__ == "PanicException"


def _byte_level_alphabet() -> dict[str, int]:
    """letter -> byte, the table of GPT-2: printable bytes stand for themselves, the others are moved up by 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(moved)})
    return alphabet
