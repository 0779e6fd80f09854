"""Build polymoe's wheels from its sdist, with and without a compiler, and use each in a clean environment.

    python tools/try_wheels.py                         # every Python from 3.11 to 3.14 that is found
    python tools/try_wheels.py --python python3.13 --torch-index https://download.pytorch.org/whl/cpu
    python tools/try_wheels.py --build-only            # no torch to download

A wheel with a compiled library must be tagged for this platform and for every Python, and use the library where the
processor can run it; one without must be pure, and say once that it computes with torch alone. A Python for which there
is no torch is named and left out.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"x86_64": 4, "aarch64": 2}  # of each level that hatch_build.py knows
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
# In the wheel's environment: plan the package's own models and let one speak, on whatever computes here.
USE = """
import sys
from polymoe import LLM, SamplingParams
from polymoe.demo import family_paths
from polymoe.native.installed import processor_suits
from polymoe.native.library import cpu_kernels
llm = LLM(family_paths(), dtype="bfloat16", device="cpu", kv_cache_bytes=1 << 24)
(output,) = llm.generate(["ROMEO:"], SamplingParams(max_tokens=4, temperature=0), variants=["drama"])
assert len(output.outputs[0].token_ids) == 4
compiled, expected = cpu_kernels() is not None, sys.argv[1] == "compiled" and processor_suits()
assert compiled == expected, (compiled, expected)
print("computes with", "compiled kernels" if compiled else "torch alone")
"""
SAID = "polymoe was installed without its compiled CPU kernels"


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Its output is shown when it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))[:300]}\n{(done.stdout + done.stderr)[-4000:]}")
    return done  # type: ignore[no-any-return]


def build(python: str | Path, sdist: Path, out: Path, compiler: bool) -> Path:
    """The wheel that pip makes of the sdist; without a compiler PATH leads to none."""
    environment = dict(os.environ)
    if not compiler:
        out.mkdir(parents=True)
        environment.pop("CXX", None)
        environment["PATH"] = str(out)
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", out, sdist, env=environment)
    (wheel,) = out.glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    tag = "-".join(wheel.stem.split("-")[-3:])
    if compiler:
        assert len(libraries) == LIBRARIES.get(platform.machine()), libraries
        assert tag.startswith("py3-none-"), tag
        assert not tag.endswith("-any"), tag
    else:
        assert not libraries, libraries
        assert tag == "py3-none-any", tag
    print(f"  {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    return wheel


def install(python: Path, wheel: Path, torch_index: str | None) -> bool:
    """polymoe and what it needs. False where this Python has no torch."""
    pip: list[str | Path] = [python, "-m", "pip", "install", "-q"]
    source = ["--index-url", torch_index, "--no-deps"] if torch_index else []
    torch = subprocess.run(
        [*map(str, pip), "-c", str(ROOT / "constraints.txt"), *source, "torch"], capture_output=True, text=True
    )
    if torch.returncode != 0:
        if "No matching distribution found for torch" not in torch.stderr:
            raise SystemExit(torch.stderr[-4000:])
        return False
    run(*pip, "-c", ROOT / "constraints.txt", wheel)
    return True


def use(python: Path, kind: str, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("POLYMOE_", "PYTHONPATH"))}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = run(python, "-I", "-c", USE, kind, cwd=folder, env=environment)
    said = done.stderr.count(SAID)
    assert said == (kind == "pure"), done.stderr
    run(python.with_name("polymoe"), "--version", cwd=folder, env=environment)
    print(f"  {kind}: {done.stdout.strip().splitlines()[-1]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", help="executables; default: those of 3.11 to 3.14 that are found")
    parser.add_argument("--torch-index", help="index of another build of torch than PyPI's")
    parser.add_argument("--build-only", action="store_true", help="do not install the wheels and use them")
    arguments = parser.parse_args()
    found = arguments.python or [name for name in PYTHONS if works(name)]
    if missing := [name for name in PYTHONS if name not in found and not arguments.python]:
        print(f"not found, not tried: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="polymoe-wheels-") as temporary:
        root = Path(temporary)
        run(sys.executable, "-m", "venv", root / "builder")
        run(root / "builder/bin/python", "-m", "pip", "install", "-q", "hatchling")
        run(root / "builder/bin/hatchling", "build", "-t", "sdist", "-d", root / "sdist", cwd=ROOT)
        (sdist,) = (root / "sdist").glob("*.tar.gz")
        print(f"{sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
        for name in found:
            folder = root / Path(name).name
            run(name, "-m", "venv", folder / "venv")
            python = folder / "venv/bin/python"
            print(run(python, "--version").stdout.strip(), flush=True)
            wheels = {kind: build(python, sdist, folder / kind, kind == "compiled") for kind in ("compiled", "pure")}
            if arguments.build_only:
                continue
            if not install(python, wheels["compiled"], arguments.torch_index):
                print("  there is no torch for this Python: not used")
                continue
            use(python, "compiled", folder)
            run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheels["pure"])
            use(python, "pure", folder)
            shutil.rmtree(folder)
    return 0


def works(name: str) -> bool:
    """A shim of pyenv is found and fails."""
    return shutil.which(name) is not None and subprocess.run([name, "--version"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
