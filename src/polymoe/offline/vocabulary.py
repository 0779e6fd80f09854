"""Do the tokenizers of a family mean the same tokens? Fine-tunes may add rows at the end, not reorder."""

from pathlib import Path
from typing import Any

from polymoe.errors import CheckpointError, FamilyError
from polymoe.offline.source import read_json

MAX_ADDED_ROWS = 1024


def read_vocabulary(folder: Path) -> dict[int, str] | None:
    """{id: token} of a checkpoint's tokenizer, without its added tokens, which fine-tunes rename freely.

    None where there is nothing to compare: no tokenizer, or one in a format other than tokenizer.json and vocab.json.
    Raises `CheckpointError` for a file that is not JSON, or no tokenizer.
    """
    try:
        return _read_vocabulary(folder)
    except (AttributeError, TypeError, LookupError) as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error}); save it again.") from error


def _read_vocabulary(folder: Path) -> dict[int, str] | None:
    if (folder / "tokenizer.json").exists():
        content = read_json(folder / "tokenizer.json")
        vocab: Any = content.get("model", {}).get("vocab")
        added = {token.get("id") for token in content.get("added_tokens") or []}
    elif (folder / "vocab.json").exists():
        vocab, added = read_json(folder / "vocab.json"), set()
    else:
        return None
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel: token -> id
        pairs = {index: token for token, index in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [token, score] at its id
        pairs = {index: entry[0] for index, entry in enumerate(vocab)}
    else:
        return None
    return {index: token for index, token in pairs.items() if index not in added}


def check_vocabularies(names: list[str], folders: list[Path], sizes: list[int]) -> None:
    """Raise `FamilyError` when a token id below every variant's vocabulary size means different tokens.

    A variant without a tokenizer takes part with token ids only and is not compared.
    """
    smallest, largest = min(sizes), max(sizes)
    if largest - smallest > MAX_ADDED_ROWS:
        small, large = names[sizes.index(smallest)], names[sizes.index(largest)]
        raise FamilyError(
            f"vocabularies differ: {small} has {smallest} rows, {large} has {largest}. "
            f"Fine-tunes that added at most {MAX_ADDED_ROWS} tokens can be served together."
        )
    vocabularies = []
    for name, folder in zip(names, folders, strict=True):
        try:
            vocabularies.append((name, read_vocabulary(folder)))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    known = [(name, vocabulary) for name, vocabulary in vocabularies if vocabulary is not None]
    for name, vocabulary in known[1:]:
        first_name, first = known[0]
        for index in sorted(first.keys() & vocabulary.keys()):
            if index < smallest and first[index] != vocabulary[index]:
                raise FamilyError(
                    f"tokenizers differ: token {index} is {first[index]!r} in {first_name} and "
                    f"{vocabulary[index]!r} in {name}; these models do not come from one ancestor."
                )
