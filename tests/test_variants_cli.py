"""`polymoe variants` as its users type it, against a running server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from families import make_family
from polymoe.cli.main import app
from polymoe.errors import ConfigError, PolymoeError
from polymoe.offline.api import make_plan
from servers import ThreadServer, engine_config

ADMIN = "admin-key"


class Terminal:
    """Types commands."""

    def __init__(self, server: ThreadServer, root: Path) -> None:
        self.root = root
        self.environment = {"POLYMOE_URL": server.url, "POLYMOE_ADMIN_KEY": ADMIN, "COLUMNS": "200"}

    def type(self, *words: str, **environment: str | None) -> str:
        result = CliRunner().invoke(app, ["variants", *words], env=self.environment | environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
        return result.output

    def refused(self, *words: str, **environment: str | None) -> str:
        with pytest.raises(PolymoeError) as error:
            self.type(*words, **environment)
        return str(error.value)

    def meant(self) -> dict[str, str]:
        """Name -> version."""
        found: dict[str, Any] = json.loads(self.type("list", "--json"))
        return {name: card["version"] for card in found["data"] for name in card["names"]}


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    folder = tmp_path_factory.mktemp("cli")
    root = folder / "root"
    paths = make_family("mixtral", root, num_variants=4, tokenizer=True, changed=0.1, max_position_embeddings=256)
    bundle = make_plan({name: paths[name] for name in ("base", "v1")}, "separate", None, folder / "bundle").path
    config = engine_config(bundle, max_variants=6, dtype="float32", headroom=64 << 20)
    with ThreadServer(config, api_key="client", admin_key=ADMIN, variants_root=root, plan_threads=1) as server:
        yield Terminal(server, root)


def write_patch(base: Path, out: Path) -> None:
    (name, tensor), *_ = sorted(load_file(base / "model.safetensors").items())
    places = torch.arange(0, tensor.numel(), 50)
    values = tensor.flatten()[places] + 1
    save_file({f"{name}.indices": places, f"{name}.values": values, f"{name}.shape": torch.tensor(tensor.shape)}, out)


def test_every_command(terminal: Terminal) -> None:
    planned = terminal.meant()
    assert planned.keys() == {"base", "v1"}
    listed = terminal.type("list")
    assert "planned" in listed
    assert "2 of 6 versions; headroom 64.0 MiB." in listed

    assert "math is served (version " in terminal.type("add", "math", "v2")
    first = terminal.meant()["math"]
    replaced = terminal.type("replace", "math", "v3", "--evict", "previous")
    second = terminal.meant()["math"]
    assert second != first
    assert replaced == f"math is replaced (version {second[:8]}).\n"
    assert f"math means math@{first[:8]} now." in terminal.type("rollback", "math")
    assert terminal.meant()["math"] == first
    terminal.type("rollback", "math")

    write_patch(terminal.root / "base", terminal.root / "step.safetensors")
    assert "base is patched (version " in terminal.type("patch", "base", "step.safetensors")
    assert terminal.meant()["base"] != planned["base"]
    assert json.loads(terminal.type("rollback", "base", "--json"))["version"] == planned["base"]

    assert f"prod means math@{second[:8]} now." in terminal.type("alias", "prod", "math")
    assert terminal.meant()["prod"] == second
    assert f"math@{first[:8]} is pinned." in terminal.type("pin", f"math@{first[:8]}")
    assert "pinned" in terminal.type("list")
    assert "is not pinned any more." in terminal.type("pin", f"math@{first[:8]}", "--off")
    assert terminal.type("remove", "prod") == "prod is removed.\n"
    assert json.loads(terminal.type("remove", "math", "--force", "--json"))["state"] == "done"
    assert terminal.meant() == planned


def test_what_goes_on_without_waiting(terminal: Terminal) -> None:
    begun = terminal.type("add", "later", "v2", "--no-wait", "--bits", "2")
    assert "`polymoe variants list` shows how far it is." in begun
    assert "later: " in terminal.type("list")
    assert "is being changed" in terminal.refused("add", "later", "v3")
    while "later" not in terminal.meant():
        assert "failed" not in terminal.type("list")
    terminal.type("remove", "later")


def test_what_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    before = terminal.meant()
    assert "give the admin's key" in terminal.refused("list", POLYMOE_ADMIN_KEY=None)
    assert "The admin's key is needed" in terminal.refused("list", POLYMOE_ADMIN_KEY="wrong")
    assert "no HTTP header" in terminal.refused("list", POLYMOE_ADMIN_KEY="schlüssel")
    assert "cannot be read" in terminal.refused("list", "--admin-key-file", str(tmp_path / "none"))
    key = tmp_path / "key"
    key.write_text(ADMIN + "\n")
    assert "base" in terminal.type("list", "--admin-key-file", str(key), POLYMOE_ADMIN_KEY=None)
    for url in ("http://127.0.0.1:9", "nothing", "http://127.0.0.1:9/a b"):
        assert "is the server running?" in terminal.refused("list", "--url", url)
    assert "There is no variant nobody" in terminal.refused("remove", "nobody")
    assert "no name of a variant" in terminal.refused("add", "a b?c#d", "v2")
    assert "There is no variant a b?c#d" in terminal.refused("remove", "a b?c#d")
    assert "neither a variant nor below" in terminal.refused("add", "x", "../../etc")
    assert "There is a variant base" in terminal.refused("add", "base", "v2")
    (terminal.root / "empty").mkdir()
    assert "config.json" in terminal.refused("add", "x", "empty")
    assert "x: add failed: " in terminal.type("list")
    assert terminal.meant() == before


def test_a_key_that_is_empty(tmp_path: Path) -> None:
    empty = tmp_path / "key"
    empty.write_text("\n")
    result = CliRunner().invoke(app, ["variants", "list", "--admin-key-file", str(empty)])
    assert isinstance(result.exception, ConfigError)
