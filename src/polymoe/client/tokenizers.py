"""The tokenizers of a client's variants, each loaded once: variants of a family mostly came with the same files.

To load one holds the interpreter's lock for up to a second (a large vocabulary), and with it every stream of a server;
to find out that it is there already does not.
"""

import hashlib
import json
from pathlib import Path
from weakref import WeakValueDictionary

from polymoe.errors import BundleError
from polymoe.text.tokenizer import VariantTokenizer

_OTHER_FILES = ("config.json", "generation_config.json")
_ASKED_OF_CONFIG = ("model_type", "tokenizer_class", "auto_map")  # by whoever loads a tokenizer


class Tokenizers:
    """By folder. Not thread-safe but for `load`, which changes nothing."""

    def __init__(self) -> None:
        self._by_folder: dict[str, VariantTokenizer] = {}
        self._by_content: WeakValueDictionary[str, VariantTokenizer] = WeakValueDictionary()

    @property
    def loaded(self) -> list[VariantTokenizer]:
        """Each once."""
        return list({id(tokenizer): tokenizer for tokenizer in self._by_folder.values()}.values())

    def get(self, folder: str) -> VariantTokenizer | None:
        """None where it is not loaded."""
        return self._by_folder.get(folder)

    def load(self, folder: str) -> tuple[str, VariantTokenizer]:
        """(what tells its files from others, the tokenizer), one that is there if its files are the same. Raises
        `BundleError` for one that cannot be used."""
        content = _content(Path(folder))
        return content, self._by_content.get(content) or VariantTokenizer(folder)

    def hold(self, folder: str, content: str, tokenizer: VariantTokenizer) -> VariantTokenizer:
        """Keep what `load` found."""
        self._by_content[content] = self._by_folder[folder] = tokenizer
        return tokenizer

    def drop(self, folder: str) -> None:
        """No variant has it any more."""
        self._by_folder.pop(folder, None)


def _content(folder: Path) -> str:
    """SHA-256 over all that a tokenizer is made of."""
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in _OTHER_FILES:
                with path.open("rb") as file:
                    digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        config = folder / "config.json"
        fields = json.loads(config.read_bytes()) if config.is_file() else {}
        digest.update(json.dumps([fields.get(key) for key in _ASKED_OF_CONFIG]).encode())
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"The tokenizer in {folder.name!r} cannot be loaded: {error}") from error
    return digest.hexdigest()
