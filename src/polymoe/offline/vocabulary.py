"""Do the tokenizers of a family mean the same tokens? Fine-tunes may add rows at the end, not reorder."""

from pathlib import Path
from typing import Any

from polymoe.errors import CheckpointError, FamilyError, named
from polymoe.offline.plain_files import read_json

MAX_ADDED_ROWS = 1024


def read_vocabulary(folder: Path) -> dict[int, str] | None:
    """{id: token} of a checkpoint's tokenizer, without its added tokens, which fine-tunes rename freely.

    None where there is nothing to compare: no tokenizer, or one in a format other than tokenizer.json and vocab.json.
    Raises `CheckpointError` for a file that is not JSON, or not a vocabulary.
    """
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            content = read_json(file)
            vocab: Any = (content.get("model") or {}).get("vocab")
            added = {token["id"] for token in content.get("added_tokens") or []}
        elif (file := folder / "vocab.json").exists():
            vocab, added = read_json(file), set()
        else:
            return None
        if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel: token -> id
            pairs = {int(index): token for token, index in vocab.items()}
        elif isinstance(vocab, list):  # Unigram: [token, score] at its id
            pairs = {index: entry[0] for index, entry in enumerate(vocab)}
        else:
            return None
        return {index: token for index, token in pairs.items() if index not in added}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a tokenizer's vocabulary ({type(error).__name__}: {error}); download it again."
        ) from error


def check_vocabularies(names: list[str], folders: list[Path], sizes: list[int]) -> None:
    """Raise `FamilyError` when a token id below every variant's vocabulary size means different tokens.

    A variant without a tokenizer takes part with token ids only and is not compared.
    """
    smallest, largest, place = min(sizes), max(sizes), dict(zip(names, folders, strict=True))
    if largest - smallest > MAX_ADDED_ROWS:
        small, large = names[sizes.index(smallest)], names[sizes.index(largest)]
        raise FamilyError(
            f"vocabularies differ: {small} has {smallest} rows, {large} has {largest} ({place[small]}, "
            f"{place[large]}). Fine-tunes that added at most {MAX_ADDED_ROWS} tokens can be served "
            "together; plan the others as families of their own."
        )
    vocabularies = []
    for name, folder in zip(names, folders, strict=True):
        with named(name, folder):
            vocabularies.append((name, read_vocabulary(folder)))
    known = [(name, vocabulary) for name, vocabulary in vocabularies if vocabulary is not None]
    for name, vocabulary in known[1:]:
        first_name, first = known[0]
        for index in sorted(first.keys() & vocabulary.keys()):
            if index < smallest and first[index] != vocabulary[index]:
                raise FamilyError(
                    f"tokenizers differ: token {index} is {first[index]!r} in {first_name} and "
                    f"{vocabulary[index]!r} in {name} ({place[first_name]}, {place[name]}); these models do not come "
                    "from one ancestor. Plan them as families of their own, or give each its own tokenizer."
                )
