"""Tokenizers of variants: the same files are loaded once, and one that comes does not stop the streams of others."""

import asyncio
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from families import make_family
from polymoe.client import tokenizers
from polymoe.client.output import OutputProcessor
from polymoe.client.tokenizers import Tokenizers
from polymoe.errors import BundleError
from polymoe.text.tokenizer import VariantTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_family("mixtral", tmp_path_factory.mktemp("family"), num_variants=1, tokenizer=True)["base"]
    (made / "model.safetensors").unlink()
    return made


def loaded(known: Tokenizers, folder: Path) -> VariantTokenizer:
    return known.hold(str(folder), *known.load(str(folder)))


def test_the_same_files_are_loaded_once(folder: Path, tmp_path: Path) -> None:
    known = Tokenizers()
    first = loaded(known, folder)
    same = shutil.copytree(folder, tmp_path / "same")
    (same / "generation_config.json").write_text("{}")
    assert loaded(known, same) is first
    assert known.get(str(same)) is first
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert loaded(known, other) is not first
    assert known.get(str(other)) is not first
    assert len(known.loaded) == 2
    for gone in (other, same):
        known.drop(str(gone))
        assert known.get(str(gone)) is None
    assert known.loaded == [first]
    for broken in ("tokenizer.json", "config.json"):
        bad = shutil.copytree(folder, tmp_path / broken)
        (bad / broken).write_text("{")
        with pytest.raises(BundleError, match="cannot be loaded"):
            known.load(str(bad))


def test_streams_go_on_while_one_is_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text("another")
    processor = OutputProcessor(SimpleNamespace(variants=[], names={"none": 0}))  # type: ignore[arg-type]
    turns = 0

    class Slow(VariantTokenizer):
        def __init__(self, folder: str | Path) -> None:
            time.sleep(0.3)
            super().__init__(folder)

    monkeypatch.setattr(tokenizers, "VariantTokenizer", Slow)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.01)

    async def add() -> None:
        ticking = asyncio.create_task(turn())
        await processor.add_version(SimpleNamespace(place=0, tokenizer_dir=str(other)))  # type: ignore[arg-type]
        ticking.cancel()
        with pytest.raises(BundleError):
            await processor.add_version(SimpleNamespace(place=1, tokenizer_dir="nowhere"))  # type: ignore[arg-type]

    asyncio.run(add())
    assert turns > 10
    assert processor.versions.held.keys() == {0}
