"""Checkpoints that lie: what would run code, read files of this machine, wait for ever or fail only when served is
refused when it is planned, and the message names the file."""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import modeling_utils

from families import make_family
from polymoe.errors import CheckpointError, PolymoeError, UnsupportedModelError
from polymoe.evaluate.fidelity import OriginalModel
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.architecture import build_on_meta
from polymoe.offline.checkpoint.checkpoint import Checkpoint, read_config
from polymoe.offline.checkpoint.family import Family


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("mixtral", tmp_path_factory.mktemp("mixtral"), num_variants=1, tokenizer=True)["base"]


@pytest.fixture
def copy(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "copy"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would load code from the Hub."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("code was loaded from the Hub")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", loaded)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)


EVIL = ["evil/repo", "kernels-community/flash-attn2", "evil/repo@main", "kernels-community/x:f", {"": "evil/repo"}, 7]


@pytest.mark.parametrize("value", EVIL)
@pytest.mark.parametrize(
    "key", ["_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation",
            "_attn_implementation_internal"]
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("no_kernels")
def test_kernels_of_the_hub_are_refused(copy: Path, key: str, value: Any, nested: bool) -> None:
    """transformers takes such a value for a repository and runs its code; only a missing package stopped it."""
    edit(copy / "config.json", **({"text_config": [{"deep": {key: value}}]} if nested else {key: value}))
    message = rf"config\.json asks for custom code \({key}: .*Remove the {key} entry"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy, "x")
    with pytest.raises(CheckpointError, match=message):
        OriginalModel(copy, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_nested_auto_map_is_refused(copy: Path, file: str) -> None:
    edit(copy / file, text_config={"auto_map": {"AutoConfig": "evil.Evil"}})
    with pytest.raises(CheckpointError, match=rf"{file} asks for custom code \(auto_map\)"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("value", ["eager", "sdpa", "flash_attention_2", "flash_attention_3", None])
@pytest.mark.usefixtures("no_kernels")
def test_names_of_transformers_own_attention_mean_nothing(copy: Path, value: str | None) -> None:
    """Trainers leave them in configs. `flash_attention_2` falls back to a repository of the Hub where the package is
    missing, so that the entry is dropped, not obeyed."""
    edit(copy / "config.json", _attn_implementation=value, attn_implementation=value, _attn_implementation_autoset=True)
    Family.open({"x": copy})
    build_on_meta(read_config(copy))


def link_of_links(path: Path, secret: Path) -> None:
    (path.parent.parent / "hop").symlink_to(secret)
    path.symlink_to("../hop")


OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda path, secret: path.symlink_to(secret),
    "a relative link": lambda path, secret: path.symlink_to(os.path.relpath(secret, path.parent)),
    "a link of links": link_of_links,
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a socket": lambda path, _: _socket(path),
}


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
     "model.safetensors", "additional_chat_templates/tool.jinja", "tokenizer.model", "vocab.json"],
)  # fmt: skip
def test_files_out_of_the_checkpoint(copy: Path, tmp_path: Path, file: str, how: str) -> None:
    """`chat_template.jinja -> ../../secret.txt` ended in the bundle and in rendered chats; a FIFO was waited for."""
    (tmp_path / "secret.txt").write_text("password")
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    OUTSIDE[how](path, tmp_path / "secret.txt")
    reason = "outside of" if "link" in how else "only regular files are read"
    with pytest.raises(CheckpointError, match=rf"{file} .*{reason}"):
        make_plan({"x": copy}, "separate", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_a_checkpoint(copy: Path) -> None:
    (copy / "kept").mkdir()
    (copy / "tokenizer.json").rename(copy / "kept" / "t")
    (copy / "tokenizer.json").symlink_to("kept/t")
    (copy / "tokenizer").mkdir()  # of another library, and not read
    (copy / "latest").symlink_to("/tmp")
    Checkpoint.open(copy, "x")


def test_a_copy_with_links_into_the_hubs_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older clients' `--local-dir` links to the cache's blobs; only to them."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    blobs = cache / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (copy / "model.safetensors").rename(blobs / "00ff")
    (copy / "model.safetensors").symlink_to(blobs / "00ff")
    Checkpoint.open(copy, "x")
    (blobs / "00ff").rename(cache / "token")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(cache / "token")
    with pytest.raises(CheckpointError, match=r"model\.safetensors leads to"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**5),
        ("num_hidden_layers", 10**12),
        ("num_local_experts", 10**5),
        ("n_routed_experts", 10**9),
    ],
)
def test_more_layers_or_experts_than_weights(copy: Path, key: str, value: int) -> None:
    """A config of 100,000 layers kept the planner busy for minutes."""
    edit(copy / "config.json", **{key: value})
    started = time.monotonic()
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: {key} is {value}, but the weights have room for"):
        Checkpoint.open(copy, "x")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_position_embeddings", value) for value in (-1, 0, 2.5, "4096", True, [1], 10**18)),
        *(("eos_token_id", value) for value in ("</s>", ["</s>"], 1.5, True, {"id": 1}, [[1]])),
        *(("bos_token_id", value) for value in ("<s>", [1], 1.5)),
        *(("pad_token_id", value) for value in ("<pad>", False)),
        *(("num_experts_per_tok", value) for value in (0, -1, "2")),
        *(("decoder_start_token_id", value) for value in ("<s>", [0])),
    ],
)
def test_values_that_no_model_can_have(copy: Path, key: str, value: Any) -> None:
    edit(copy / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*; it must be a"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 2.5])
def test_token_ids_of_the_generation_config(copy: Path, value: Any) -> None:
    edit(copy / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*; it must be a token id"):
        Checkpoint.open(copy, "x")


@pytest.mark.parametrize("value", [-1, None, 1, [1, 2]])
def test_token_ids_that_stock_configs_have(copy: Path, value: Any) -> None:
    edit(copy / "config.json", eos_token_id=value, pad_token_id=-1)
    edit(copy / "generation_config.json", eos_token_id=value)
    Checkpoint.open(copy, "x")


@pytest.mark.parametrize("text", ['{"rope_theta": NaN}', "{" * 10_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "null"])
def test_json_that_is_none(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (not readable as JSON|a JSON object is expected)"):
        Checkpoint.open(copy, "x")


WRONG: tuple[Any, ...] = (-1, 0, 10**5, 10**18, 2.5, "text", None, [], {}, True, 1e300, float("inf"))


@pytest.mark.parametrize("arch", ["mixtral", "switch_transformers"])
def test_no_value_of_any_field_is_a_traceback(arch: str, tmp_path: Path) -> None:
    """Each field of a config takes each value in turn: it is served or refused, at once."""
    path = make_family(arch, tmp_path, num_variants=1)["base"]
    config = json.loads((path / "config.json").read_text())
    kept = {"architectures", "transformers_version", "model_type"}
    for key in [key for key in config if key not in kept]:
        for value in WRONG:
            (path / "config.json").write_text(json.dumps(config | {key: value}))
            started = time.monotonic()
            with contextlib.suppress(PolymoeError):
                Checkpoint.open(path, "x")
            assert time.monotonic() - started < 20, (key, value)
