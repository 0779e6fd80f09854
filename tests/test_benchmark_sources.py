"""The key of kept figures: every source that they run through changes it, and nothing else does."""

import ast
import shutil
from pathlib import Path

import pytest

import benchmarks.baselines
import polymoe
from benchmarks.baselines.sources import BESIDE, digest_of, source_files, sources

PACKAGE = Path(polymoe.__file__).parent
BASELINES = Path(benchmarks.baselines.__file__).parent


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package's and the baselines' files, to be changed; without checkpoints and what was compiled."""
    folder = tmp_path_factory.mktemp("sources")
    unwanted = shutil.ignore_patterns("*.safetensors", "*.so", "__pycache__", "text")
    return (
        Path(shutil.copytree(PACKAGE, folder / "polymoe", ignore=unwanted)),
        Path(shutil.copytree(BASELINES, folder / "baselines", ignore=unwanted)),
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "quant/*.py", "kernels/**/*.py", "kernels/**/*.cpp", "kernels/**/*.h", "model/**/*.py", "engine/**/*.py",
        "offline/**/*.py", "evaluate/**/*.py", "config.py", "quiet_torch.py",
    ],
)  # fmt: skip
def test_a_change_in_a_source_changes_the_key(copies: tuple[Path, Path], pattern: str) -> None:
    """Only offline, quant and evaluate used to count: after a numerical change in a kernel or in the model's code,
    rows that the old code had measured were found and shown as new ones."""
    package, baselines = copies
    before = digest_of(source_files(package, baselines))
    found = [path for path in package.glob(pattern) if path.stat().st_size]
    assert found, "nothing to change"
    for path in found:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b" \n")
        assert digest_of(source_files(package, baselines)) != before, path
        path.write_bytes(content)
    assert digest_of(source_files(package, baselines)) == before


def test_what_is_compared_counts_and_what_shows_it_does_not(copies: tuple[Path, Path]) -> None:
    package, baselines = copies
    before = digest_of(source_files(package, baselines))
    for path in (package / "bench" / "report.py", package / "server" / "app.py", package / "cli.py"):
        path.write_text(path.read_text() + "# another line\n")
    assert digest_of(source_files(package, baselines)) == before
    weights = baselines / "weights.py"
    weights.write_text(weights.read_text().replace("26)", "27)"))
    assert digest_of(source_files(package, baselines)) != before


def test_the_key_is_of_the_files_that_run() -> None:
    assert sources() == digest_of(source_files())
    files = set(source_files().values())
    assert set(BASELINES.glob("*.py")) <= files
    suffixes = {path.suffix for folder in ("kernels", "model", "quant") for path in (PACKAGE / folder).rglob("*.*")}
    assert suffixes <= {".py", ".cpp", ".h", ".so", ".pyc"}, "a kind of source that the key does not know"


def test_no_source_in_the_key_imports_one_outside_of_it() -> None:
    """Or a figure could change without its key."""
    outside = tuple(f"polymoe.{name.removesuffix('.py')}" for name in BESIDE)
    for name, path in source_files().items():
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in imported:
                assert not any(f"{module}.".startswith(f"{part}.") for part in outside), f"{name} imports {module}"
                if module.startswith("benchmarks."):
                    assert module.startswith("benchmarks.baselines."), f"{name} imports {module}"


def test_the_package_does_not_know_the_experiments() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path
