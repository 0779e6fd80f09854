"""Streamed text is the whole text, for any tokens: also those that are no valid UTF-8, which untrained models, clients'
logit biases and answers cut at `max_tokens` produce."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from polymoe.engine.tokenizer import VariantTokenizer
from test_tokenizer import byte_level, sentencepiece


def metaspace(folder: Path) -> Path:
    """The decoder written as Metaspace and ByteFallback, without the step that strips a first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", *"abc€", "▁a", "\ufffd"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def added(folder: Path) -> Path:
    """Byte-level with tokens that were added: plain ones, special ones, one that spells a byte with a letter."""
    fast = AutoTokenizer.from_pretrained(byte_level(folder))
    fast.add_tokens(["Ġx", "é", " y"])
    fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|▁eos▁|>"]})
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[byte_level, sentencepiece, metaspace, added])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = request.param(tmp_path_factory.mktemp("tokenizer"))
    return path


Draw = Callable[[random.Random, int], list[int]]


def draws(tokenizer: VariantTokenizer) -> list[Draw]:
    """Ways to choose tokens: any; bytes of characters, cut anywhere and put together again; mostly specials."""
    vocabulary = tokenizer.largest_token_id + 4  # rows of a padded vocabulary have no token
    text = tokenizer.encode("€ 東京 👩‍👩‍👧‍👦 ß né a  b ", add_special_tokens=False)

    def anything(rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    def broken(rng: random.Random, count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            start = rng.randrange(len(text))
            ids += text[start : start + rng.randrange(1, 30)]
        return ids[:count]

    def mixed(rng: random.Random, count: int) -> list[int]:
        return [rng.choice([0, 1, 2, rng.choice(text), rng.randrange(vocabulary)]) for _ in range(count)]

    return [anything, broken, mixed]


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_text_of_all_tokens(folder: Path, skip: bool) -> None:
    """Text used to be found by decoding a window twice and cutting it where it ended in U+FFFD. A window that began or
    was cut within bytes gave other text than the whole: broken bytes came out once too often, or not at all."""
    ours, theirs = VariantTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    for draw in draws(ours):
        for count in [*range(1, 40), 400, 5000]:
            ids = draw(rng, count)
            detokenizer = ours.detokenizer([], skip)
            streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
            assert streamed == ours.decode(ids, skip)
            whole = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert streamed == whole


@pytest.mark.parametrize("skip", [True, False])
def test_text_behind_a_prompt(folder: Path, skip: bool) -> None:
    """The prompt's own text does not come again, and a character that it began is completed."""
    ours = VariantTokenizer(folder)
    rng = random.Random(2)
    text = ours.encode("a€ b東 👩‍👩‍👧‍👦 aß n", add_special_tokens=False)
    characters = b"".join(map(ours.token_bytes, text)).decode()
    for _ in range(400):
        cut = rng.randrange(1, len(text))
        detokenizer = ours.detokenizer(text[:cut], skip)
        streamed = "".join(detokenizer.push(token) for token in text[cut:]) + detokenizer.flush()
        complete = b"".join(map(ours.token_bytes, text[:cut])).decode(errors="ignore")
        assert streamed == characters[len(complete) :]


def test_a_long_run_of_bytes_costs_no_more_than_its_length(folder: Path) -> None:
    """A client can force one byte again and again with logit_bias; decoding all of them each time is quadratic."""
    ours = VariantTokenizer(folder)
    euro = ours.encode("€", add_special_tokens=False)[-3:]
    detokenizer = ours.detokenizer([], True)
    ids = euro * 20_000 + euro[1:2] * 20_000
    streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert streamed == ours.decode(ids)
