"""Tokenizers as checkpoints bring them, and text that comes while tokens are generated."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from families import make_tokenizer
from polymoe.errors import BundleError, RequestError
from polymoe.text.detokenizer import IncrementalDetokenizer
from polymoe.text.tokenizer import VariantTokenizer

TEXTS = [
    "plain words, and  two spaces",
    "naïve café: 東京 ↔ Ελλάδα, ₿ 5 €",
    "family 👩‍👩‍👧‍👦 flag 🇩🇪 end",
    " leading space\nand a line\n\n",
]


def byte_level(folder: Path) -> Path:
    """GPT-2 style: every byte is a letter of an alphabet, rare characters are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["plain words and two spaces, leading words"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def sentencepiece(folder: Path) -> Path:
    """Llama style: `▁` for a space, stripped at the start of a text, and a token for each byte as a last resort."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["▁a", "an", "▁an", "▁and"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("▁an", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VariantTokenizer:
    return VariantTokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_whole_character_by_character(tokenizer: VariantTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) > 6
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).lstrip() == text.lstrip()


def test_a_completion_keeps_the_space_it_starts_with(tokenizer: VariantTokenizer) -> None:
    """Decoding the completion alone would lose it where the tokenizer strips the first space of a text."""
    ids = tokenizer.encode("one and two")
    for cut in range(1, len(ids)):
        detokenizer = tokenizer.detokenizer(ids[:cut], skip_special_tokens=True)
        text = "".join(detokenizer.push(token) for token in ids[cut:]) + detokenizer.flush()
        assert tokenizer.decode(ids[:cut]) + text == "one and two"


def test_random_bytes_lose_nothing(tokenizer: VariantTokenizer) -> None:
    """Untrained models speak invalid UTF-8. What is not valid becomes U+FFFD, what is valid must come through."""
    rng = random.Random(5)
    letters = tokenizer.encode("abcdefgh")
    euro = tokenizer.encode("x€")[-3:]
    for _ in range(30):
        ids = [rng.choice([*letters, *euro]) for _ in range(60)]
        ids += [*letters[-1:], *euro, *letters[-2:]]
        detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text.endswith("h€gh")
        # Of a run of bytes that turns invalid, what was valid until then has been given out; letters are the same.
        assert [c for c in text if c.isascii()] == [c for c in tokenizer.decode(ids) if c.isascii()]


def test_undecodable_tokens_are_not_held_for_ever(tokenizer: VariantTokenizer) -> None:
    """A client can force one byte again and again with logit_bias; decoding all of them each time is quadratic."""
    byte = tokenizer.encode("x€")[-2]
    longest = 0

    def decode(ids: object) -> str:
        nonlocal longest
        longest = max(longest, len(ids))  # type: ignore[arg-type]
        return tokenizer.decode(ids)  # type: ignore[arg-type]

    detokenizer = IncrementalDetokenizer(decode)
    text = "".join(detokenizer.push(byte) for _ in range(500)) + detokenizer.flush()
    assert set(text) == {"\ufffd"}
    assert longest < 50


def test_special_tokens_are_skipped_or_shown(tokenizer: VariantTokenizer) -> None:
    bos, a = tokenizer.encode("<s>")[-1], tokenizer.encode("a")[-1]
    for skip, expected in ((True, "aa"), (False, "a<s>a")):
        detokenizer = tokenizer.detokenizer([a], skip)
        text = "".join(detokenizer.push(token) for token in [a, *[bos] * (1 if not skip else 40), a])
        assert text.replace(" ", "") == expected


def test_bytes_of_tokens_join_to_the_text(tokenizer: VariantTokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token) for token in ids).decode().lstrip() == text.lstrip()
    half = tokenizer.encode("x€")[-1]
    assert tokenizer.token_text(half) == "bytes:\\xac"


def test_encoding_is_that_of_transformers(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = VariantTokenizer(tmp_path)
    for text in ("the quick brown fox", "", "dog </s> dog"):
        assert ours.encode(text) == reference(text)["input_ids"]
    with pytest.raises(RequestError, match="Unicode"):
        ours.encode("a\ud800")


def test_chat_template_writes_its_special_tokens_once(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    fast = AutoTokenizer.from_pretrained(tokenizer)
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    fast.save_pretrained(tmp_path)
    chat = VariantTokenizer(tmp_path)
    ids = chat.encode_chat([{"role": "user", "content": "and"}])
    assert ids.count(1) == 1
    assert ids[0] == 1
    with pytest.raises(RequestError, match="no system role") as refused:
        chat.encode_chat([{"role": "system", "content": "x"}])
    assert refused.value.param == "messages"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be loaded"):
        VariantTokenizer(tmp_path)
    make_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["x.Y", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="remote code"):
        VariantTokenizer(tmp_path)
