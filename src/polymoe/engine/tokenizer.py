"""The tokenizer of one variant: text to ids, ids to text, and its chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from polymoe.engine.detokenizer import IncrementalDetokenizer
from polymoe.errors import BundleError, RequestError

# Ids this far back in the prompt decide whether the first generated token starts with a space.
_CONTEXT_TOKENS = 8


class VariantTokenizer:
    """Reads tokenizer files from a local directory; never runs code that came with them.

    Raises `BundleError` when the directory holds no usable tokenizer.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        for name in ("tokenizer_config.json", "config.json"):
            file = path / name
            if file.is_file() and "auto_map" in json.loads(file.read_text()):
                raise BundleError(f"{name} of the tokenizer asks for remote code (auto_map), which is never run.")
        from transformers import AutoTokenizer  # here: it takes seconds, in which the server's port is already open

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(f"The tokenizer in {path.name!r} cannot be loaded: {error}") from error
        # The Rust tokenizer is called directly: it is several times faster a token, and safe from several threads
        # as long as nobody changes its truncation, which transformers' own __call__ does.
        self._rust: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._rust is not None:
            self._rust.no_truncation()
            self._rust.no_padding()
        self._to_bytes = self._bytes_function()
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` what the model expects around a prompt (often a first BOS).

        Raises `RequestError` for text that is not valid Unicode.
        """
        try:
            if self._rust is not None:
                ids = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError) as error:
            raise RequestError("The text is not valid Unicode (lone surrogates).", param="prompt") from error
        return list(ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids the tokenizer does not know (a padded vocabulary) give no text."""
        if self._rust is not None:
            return str(self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        # Without the clean-up of spaces the text of a prefix stays a prefix of the text.
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def render_chat(self, messages: list[dict[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """`messages` through the variant's own chat template (transformers runs it in Jinja's sandbox), ready for
        the assistant's turn. `variables`: for the template. Raises `RequestError` when there is no template or the
        template refuses."""
        if not self.has_chat_template:
            raise RequestError(
                "This variant has no chat template; use /v1/completions with a plain prompt.", param="messages"
            )
        try:
            options = {"add_generation_prompt": True, **(variables or {}), "tokenize": False}
            return str(self._tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise RequestError(
                f"The chat template refused the messages: {str(error)[:200]}", param="messages"
            ) from error
        except Exception as error:  # a template is a program: any error in it is caused by these messages
            raise RequestError(
                f"The chat template cannot render the messages ({type(error).__name__}).", param="messages"
            ) from error

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the rendered chat. The template writes its special tokens itself, so none are added again."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> IncrementalDetokenizer:
        """A detokenizer for what follows this prompt."""

        def decode(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special_tokens)

        return IncrementalDetokenizer(decode, prompt_token_ids[-_CONTEXT_TOKENS:])

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

        if self._rust is None or self._rust.decoder is None:
            return plain
        decoder = self._rust.decoder.__getstate__().decode()
        if '"ByteLevel"' in decoder:
            alphabet = _byte_level_alphabet()

            def byte_level(token_id: int) -> bytes:
                token = self._rust.id_to_token(token_id) or ""
                if all(letter in alphabet for letter in token):
                    return bytes(alphabet[letter] for letter in token)
                return str(token).encode()

            return byte_level
        if "▁" in decoder or '"Metaspace"' in decoder:

            def pieces(token_id: int) -> bytes:
                token = self._rust.id_to_token(token_id) or ""
                if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                    return bytes([int(token[3:5], 16)])
                return str(token).replace("▁", " ").encode()

            return pieces
        return plain


def _byte_level_alphabet() -> dict[str, int]:
    """letter -> byte, the table of GPT-2: printable bytes stand for themselves, the others are moved up by 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(moved)})
    return alphabet
