"""The choice of configurations: what is used without a GPU, and the file that remembers timings."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from polymoe.kernels.gpu import autotune
from polymoe.kernels.gpu.autotune import Config, choose, row_bucket

CANDIDATES = (Config(64, 64, 4, 3), Config(128, 64, 8, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU candidates are timed")
def test_nothing_is_timed_without_a_gpu() -> None:
    def launch(config: Config) -> None:
        raise AssertionError(config)

    assert choose("kernel", (1, 2), CANDIDATES, launch) == CANDIDATES[0]


def test_rows_are_told_apart_by_powers_of_two() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_file_keeps_devices_apart_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune._read() == {}
    autotune._save("one", {"a": 1})
    autotune._save("two", {"b": 0})
    assert autotune._read() == {"one": {"a": 1}, "two": {"b": 0}}
    (file,) = (tmp_path / "polymoe").iterdir()
    file.write_text("{")
    assert autotune._read() == {}
    autotune._save("one", {"a": 1})
    assert autotune._read() == {"one": {"a": 1}}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "polymoe").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune._save("one", {"a": 1})
    assert autotune._read() == {}


def test_a_configuration_that_cannot_be_compiled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's error in one candidate must not keep an engine from starting; in all of them it is told."""

    def launch(config: Config) -> None:
        if config == CANDIDATES[0]:
            raise RuntimeError("PassManager::run failed")

    assert autotune._time(launch, CANDIDATES[0]) == float("inf")
    for name, value in (("is_available", True), ("get_device_name", "GPU"), ("is_current_stream_capturing", False)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(autotune, "_known", lambda _device: {})
    monkeypatch.setattr(autotune, "_save", lambda _device, _known: None)
    monkeypatch.setattr(autotune, "_time", lambda _launch, _candidate: float("inf"))
    with pytest.raises(RuntimeError, match="PassManager"):
        choose("kernel", (1, 2), CANDIDATES, launch)
