"""Which compiled library is used."""

import shutil
from pathlib import Path

import pytest

from polymoe.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.cpu_kernels() is None, reason="the CPU kernels are not built, or this processor has no AVX512-BF16"
)


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update without a build a function may have other arguments: calling it would write anywhere."""
    for path in [*cpu.LIBRARY.parent.glob("*.[ch]*"), cpu.LIBRARY]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / cpu.LIBRARY.name)
    assert cpu.cpu_kernels.__wrapped__() is not None
    (tmp_path / "bf16.h").write_text("// changed")
    with pytest.warns(UserWarning, match="built from other sources"):
        assert cpu.cpu_kernels.__wrapped__() is None
