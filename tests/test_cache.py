"""Where what was planned on the fly is kept, what happens where nothing can be kept, and how to get rid of it."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import polymoe
from polymoe.bench.family import cached_family
from polymoe.bundle import atomic
from polymoe.cache_folder import VARIABLE, cache_root, writable_cache
from polymoe.cli.cache import console as cli_console
from polymoe.cli.main import app
from polymoe.console import Console
from polymoe.errors import ConfigError
from polymoe.offline.cache import plan_cached, planned_bundle
from polymoe.offline.cache_items import cache_items

DAY = 86400


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(cli_console, "_width", 300)
    (tmp_path / "tmp").mkdir()


def planned(trio: dict[str, Path], cache: Path | None = None, console: Console | None = None, **options: Any) -> Path:
    options = {"policy": "paper", "memory": "1.0x"} | options
    return planned_bundle(trio, device="cpu", reserved=0, cache=cache, console=console, **options)


def cache_command(*arguments: str, cache: Path) -> Result:
    result = CliRunner().invoke(app, ["cache", *arguments, "--cache", str(cache)])
    assert result.exit_code == 0, result.output
    return result


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "xdg" / "polymoe"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert cache_root() == tmp_path / "chosen"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "polymoe"


def test_a_cache_that_cannot_be_written_to_is_replaced_with_a_word(
    trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a read-only container `polymoe demo` was a traceback of mkdir."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = planned(trio, console=Console(width=1000))
    temporary = tmp_path / "tmp" / f"polymoe-{os.getuid()}"
    assert first.parent == temporary / "bundles"
    assert temporary.stat().st_mode & 0o777 == 0o700
    printed = capsys.readouterr().out
    assert f"polymoe cannot be written to; what is planned is kept in {temporary}" in printed
    assert f"--cache or ${VARIABLE}" in printed
    assert planned(trio, console=Console(width=1000)) == first  # found again
    assert "Planned before" in capsys.readouterr().out


def test_a_cache_that_was_chosen_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"file/x: Not a directory.* Name a folder .* --cache or \${VARIABLE}"):
        writable_cache(tmp_path / "file" / "x")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"the cache cannot be written to: .*file: File exists"):
        writable_cache()


def test_a_temporary_folder_that_others_could_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everybody may write to /tmp: a bundle that somebody else put there could hold any weights."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = tmp_path / "tmp" / f"polymoe-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="not yours alone"):
        writable_cache()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not yours alone"):
        writable_cache()


def test_a_bundle_in_a_read_only_cache_is_served(trio: dict[str, Path], tmp_path: Path) -> None:
    """An image may come with what it serves: a bundle that is found needs no rights to write."""
    cache = tmp_path / "image"
    found = planned(trio, cache)
    mark = found.with_name(f".{found.name}.used")
    mark.unlink()
    mark.symlink_to("/dev/null/nowhere")  # its use cannot be noted
    assert planned(trio, cache) == found


def test_list_and_prune(trio: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, new = planned(trio, cache), planned(trio, cache, policy="separate", memory=None)
    month_ago = time.time() - 31 * DAY
    os.utime(old.with_name(f".{old.name}.used"), (month_ago, month_ago))
    listed = cache_command("list", cache=cache).output
    assert "bundle base, v1, v2: policy paper 1.0x" in listed
    assert "31 days ago" in listed
    assert "policy separate" in listed
    assert "today" in listed
    assert listed.index("paper") < listed.index("separate")

    assert "would remove" in cache_command("prune", "--dry-run", cache=cache).output
    assert old.exists()
    assert "nothing" not in cache_command("prune", "--unused-for", "40", cache=cache).output
    assert old.exists()
    printed = cache_command("prune", cache=cache).output
    assert str(old) in printed
    assert "in 1 folders were removed" in printed
    assert (old.exists(), new.exists()) == (False, True)
    assert sorted(path.name for path in new.parent.iterdir()) == sorted([new.name, f".{new.name}.used"])
    cache_command("prune", "--all", cache=cache)
    assert not new.exists()


def test_using_a_bundle_keeps_it(trio: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bundle = planned(trio, cache)
    mark = bundle.with_name(f".{bundle.name}.used")
    os.utime(mark, (1, 1))
    assert planned(trio, cache) == bundle
    assert mark.stat().st_mtime > time.time() - DAY


def test_prune_removes_what_can_never_be_used_again(trio: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bundle = planned(trio, cache)
    for field, value in (("polymoe_version", "0.0.1"), ("format_version", 1)):
        other = bundle.with_name(f"{field}-{'0' * 16}")
        shutil.copytree(bundle, other)
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    unfinished = bundle.with_name(f".{bundle.name}.tmp-abcdefgh")
    unfinished.mkdir()
    (unfinished / atomic._MARK).touch()
    (unfinished / "half").touch()
    assert [item.useless for item in cache_items(cache)].count(None) == 1
    assert "in 3 folders were removed" in cache_command("prune", cache=cache).output
    assert [path.name for path in bundle.parent.iterdir() if path.is_dir()] == [bundle.name]


def test_prune_touches_nothing_that_is_not_ours(trio: dict[str, Path], tmp_path: Path) -> None:
    """`--cache ~` is a folder like any other: only what polymoe made is removed."""
    cache = tmp_path / "home"
    bundle = planned(trio, cache)
    (bundle / "notes.txt").write_text("mine")
    digest = "0123456789abcdef"
    strangers = [
        cache / "bundles" / f"photos-{digest}" / "cat.jpg",
        cache / "bundles" / f"app-{digest}" / "manifest.json",
        cache / "bundles" / "mine" / "manifest.json",
        cache / "bundles" / f".mine-{digest}.tmp-abcdefgh" / "thesis.tex",
        cache / "bundles" / f".mine-{digest}.old-abcdefgh" / f"mine-{digest}" / "thesis.tex",
        cache / "families" / "smith-01234567" / "tree.txt",
        cache / "families" / "v0-01234567" / "v0" / "notes.txt",
        cache / "quality" / "report.txt",
    ]
    for path in strangers:
        path.parent.mkdir(parents=True)
        path.write_text('{"name": "my web app"}')
    (cache / "bundles" / f"link-{digest}").symlink_to(tmp_path)
    assert "in 0 folders were removed" in cache_command("prune", "--all", cache=cache).output
    assert all(path.exists() for path in strangers)
    assert (bundle / "notes.txt").exists()


def test_a_folder_that_is_being_written_is_left_alone(trio: dict[str, Path], tmp_path: Path) -> None:
    from polymoe.bundle.atomic import new_folder

    bundle = planned(trio, tmp_path)
    with new_folder(bundle.with_name(f"other-{'0' * 16}"), overwrite=False) as folder:
        (folder / "file").touch()
        cache_command("prune", "--all", cache=tmp_path)
        assert (folder / "file").exists()


def test_families_of_benchmarks_are_listed_and_pruned(tmp_path: Path) -> None:
    cached_family(tmp_path / "families", 1, "tiny")
    (item,) = cache_items(tmp_path)
    assert (item.kind, item.useless) == ("family", None)
    assert item.num_bytes > 100_000
    cache_command("prune", "--all", cache=tmp_path)
    assert cache_items(tmp_path) == []


def test_plans_for_names_and_for_specs_are_the_same(trio: dict[str, Path], tmp_path: Path) -> None:
    specs = [f"{name}={path}" for name, path in trio.items()]
    first = plan_cached(specs, "paper", "1.0x", tmp_path)
    assert plan_cached(trio, "paper", "1.0x", tmp_path) == first
    assert first.name.startswith("base-v1-v2-")
    assert polymoe.LLM(first, device="cpu", kv_cache_bytes=1 << 24).variants == ["base", "v1", "v2"]
