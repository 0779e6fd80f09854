"""Files of text as the token ids of one variant: what `--calibrate` fits to and `--text` measures on."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polymoe.errors import PolymoeError
from polymoe.offline.calibrate.text_files import Line, is_json_lines, is_sampled, read_lines, read_plain

_WANTED = 'write {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]} on every line'


class TextTokenizer:
    """A variant's own tokenizer and chat template.

    Args:
        folder: of the tokenizer. variant: its name, for messages.

    Raises `PolymoeError` where there is none, or one that cannot be loaded.
    """

    def __init__(self, folder: Path, variant: str) -> None:
        from transformers import AutoTokenizer  # here, since it takes seconds to load

        self.variant = variant
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many libraries, about the files of a checkpoint
            why = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
            raise PolymoeError(
                f"{variant} has no tokenizer that can be loaded, which text needs ({why}); add its files "
                f"(tokenizer.json, tokenizer_config.json) to {folder}."
            ) from error

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a text."""
        return list(self._tokenizer.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        """Without them."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A conversation through the chat template. Raises `PolymoeError` where there is none, or it refuses."""
        if not self._tokenizer.chat_template:
            raise PolymoeError(f'{self.variant} has no chat template; write {{"text": "…"}} in place of messages.')
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: any error in it is caused by these messages
            why = str(error).strip()[:200] or type(error).__name__
            raise PolymoeError(f"the chat template of {self.variant} refuses these messages ({why}).") from error


def read_tokens(option: str, paths: Iterable[Path], tokenizer: TextTokenizer) -> list[int]:
    """Token ids of all the files, one after the other; of a large file those of pieces spread over it.

    A file named `.jsonl` or `.ndjson` holds `{"text": …}` or `{"messages": […]}` on every line, another one plain text.

    Args: `option`: where the files were given; messages begin with it.

    Raises `PolymoeError` that names the file, and the line.
    """
    ids: list[int] = []
    for path in paths:
        if is_json_lines(path):
            lines = read_lines(option, path)
            if not lines:
                raise PolymoeError(f"{option}: {path} is empty; {_WANTED}.")
            documents = [_document(line, tokenizer) for line in lines]
            pieces = documents if is_sampled(path) else ["".join(documents)]
        else:
            pieces = read_plain(option, path)
        for text in pieces:
            ids += tokenizer.encode_plain(text)
    return ids


def _document(line: Line, tokenizer: TextTokenizer) -> str:
    """The text of one line. Texts end with a line feed; how a conversation ends is the template's to say."""
    text = _content(line, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PolymoeError(f"{line.where} is not valid Unicode (lone surrogates).") from error
    return text


def _content(line: Line, tokenizer: TextTokenizer) -> str:
    try:
        found: Any = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise PolymoeError(f"{line.where} is not JSON ({error}); {_WANTED}.") from error
    if not isinstance(found, dict):
        raise PolymoeError(f"{line.where} is not an object; {_WANTED}.")
    if ("text" in found) == ("messages" in found):
        both = "both text and messages" if "text" in found else "neither text nor messages"
        raise PolymoeError(f"{line.where} has {both}; {_WANTED}.")
    if "text" in found:
        text = found["text"]
        if not isinstance(text, str):
            raise PolymoeError(f"{line.where}: its text is no string; {_WANTED}.")
        return text if text.endswith("\n") else text + "\n"
    messages = found["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise PolymoeError(f"{line.where}: its messages are no list of objects with role and content; {_WANTED}.")
    try:
        return tokenizer.render(messages)
    except PolymoeError as error:
        raise PolymoeError(f"{line.where}: {error}") from error


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and len(message) > 1
