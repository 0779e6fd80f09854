"""What `make` installs can be installed: pip resolves it, for every supported Python, without installing it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEED_TORCH = ("compressed-tensors", "peft", "transformers")
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def plain_environment() -> dict[str, str]:
    """This one without what a machine tells pip: only PyPI is asked. How to reach it stays."""
    told = {name for name in os.environ if name.startswith("PIP_")} - {"PIP_CERT", "PIP_PROXY"}
    return {name: value for name, value in os.environ.items() if name not in told} | {"PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A current pip, which reads what a wheel needs and leaves it there; older ones download the 2.8 GB to resolve."""
    folder = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "15"]
    command += ["download", "-q", "--no-deps", "-d", str(folder), "pip"]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"PyPI is out of reach: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [sys.executable, str(next(folder.glob("pip-*.whl")) / "pip"), "--disable-pip-version-check"]


def development_requirements() -> list[str]:
    """What `.[dev]` asks for. Not rouge-score: it has no wheel, and pip builds none for another Python."""
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["dev"], *extras["bench"]]
    return [line for line in asked if not line.startswith(("polymoe[", "rouge-score"))]


def start(pip: list[str], report: Path, *arguments: str) -> subprocess.Popen[str]:
    common = ["install", "--dry-run", "--use-feature=fast-deps", "--ignore-installed", "-q", "--only-binary=:all:"]
    common += ["-c", "constraints.txt", "--report", str(report)]
    return subprocess.Popen(
        [*pip, *common, *arguments], cwd=ROOT, env=plain_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def chosen(process: subprocess.Popen[str], report: Path) -> dict[str, str]:
    """Package -> version that pip would install; fails with pip's words."""
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {package["metadata"]["name"].lower(): package["metadata"]["version"] for package in found}


# The newest; for the Python that runs this the installation that it runs in is proof.
@pytest.mark.parametrize("python", [*(pytest.param(p, marks=pytest.mark.slow) for p in PYTHONS[:-1]), PYTHONS[-1]])
def test_stock_pypi_has_what_make_installs(python: str, pip: list[str], tmp_path: Path) -> None:
    """`constraints.txt` pinned triton 3.9.0 beside torch 2.13.0, whose build on PyPI asks for 3.7.1: `make demo` ended
    in ResolutionImpossible on every machine but ours, where a build of torch without CUDA lay on the disk."""
    other = ["--python-version", python, "--target", str(tmp_path / "target")]
    packages = chosen(start(pip, tmp_path / "all.json", *other, *development_requirements()), tmp_path / "all.json")
    assert packages["torch"] == TORCH.partition("==")[2]
    if sys.platform == "linux":
        assert "triton" in packages  # the tests of the GPU kernels run in its interpreter


def test_any_build_of_the_torch_release_will_do(pip: list[str], tmp_path: Path) -> None:
    """From an index of CPU builds comes, say, 2.13.0+cpu, which asks neither for CUDA nor for triton."""
    name = TORCH.replace("==", "-") + "+cpu"
    index = tmp_path / "index" / "torch"
    index.mkdir(parents=True)
    wheel = f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(index / wheel, "w") as archive:
        version = name.removeprefix("torch-")
        archive.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    (index / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    first = start(pip, tmp_path / "torch.json", "--no-deps", "--index-url", index.parent.as_uri(), "torch")
    other = ["--find-links", str(index), "--python-version", PYTHONS[-1], "--target", str(tmp_path / "target")]
    asked = [line for line in development_requirements() if line.startswith(("torch", "triton", *NEED_TORCH))]
    then = start(pip, tmp_path / "all.json", *other, *asked)
    assert chosen(first, tmp_path / "torch.json") == {"torch": version}
    packages = chosen(then, tmp_path / "all.json")
    assert packages["torch"] == version
    assert not [package for package in packages if package.startswith(("nvidia", "cuda"))]
    if sys.platform == "linux":
        assert "triton" in packages


def make(folder: Path, *arguments: str) -> str:
    """The commands that `make` would run in a folder with nothing but what an installation reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hatch_build.py"):
        shutil.copy2(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "TORCH_INDEX")}
    done = subprocess.run(["make", "-n", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_index_of_torch_is_obeyed_and_remembered(tmp_path: Path) -> None:
    """An index that is named once torch is installed must not be accepted and ignored, and must not be forgotten."""
    url, other = "https://example.org/cpu", "https://example.org/rocm"
    assert "--index-url" not in make(tmp_path, "dev")
    assert f"--no-deps --index-url {url} torch" in make(tmp_path, "dev", f"TORCH_INDEX={url}")
    venv = tmp_path / ".venv"
    venv.mkdir()
    (venv / ".torch-index").write_text(f"{url}\n")
    assert f"--no-deps --index-url {url} torch" in make(tmp_path, "dev")  # constraints.txt changed: again from there
    (venv / ".installed").touch()
    (venv / ".installed-dev").touch()
    assert "pip install" not in make(tmp_path, "dev")
    assert "pip install" not in make(tmp_path, "dev", f"TORCH_INDEX={url}")
    assert f"--force-reinstall --no-deps --index-url {other} torch" in make(tmp_path, "dev", f"TORCH_INDEX={other}")
    assert "--force-reinstall --no-deps torch" in make(tmp_path, "dev", "TORCH_INDEX=")  # back to PyPI's


def test_a_wheel_is_built_without_a_compiler(pip: list[str], tmp_path: Path) -> None:
    """Then it has no compiled library, suits every machine, and polymoe computes with torch alone."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy2(ROOT / name, source)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    environment = plain_environment() | {"PATH": str(tmp_path)}
    environment.pop("CXX", None)
    command = [*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheels"), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name == f"polymoe-{PROJECT['version']}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "polymoe/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]
