"""Which sources a figure comes from: a change in any of them makes kept figures old."""

import hashlib
from functools import cache
from pathlib import Path

import polymoe

# Parts of the package that no figure runs through. Whatever else is there counts, new folders too.
BESIDE = ("bench", "server", "deploy", "place", "demo", "cli", "cli/main.py", "cli/arguments.py", "__main__.py")
_PACKAGE = Path(polymoe.__file__).parent
_HERE = Path(__file__).parent


def source_files(package: Path = _PACKAGE, baselines: Path = _HERE) -> dict[str, Path]:
    """Name -> file: Python, C++ and headers of the package but what is `BESIDE`, and of this folder."""
    found = {}
    for root in (package, baselines):
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            if path.is_file() and parts[0] not in BESIDE and path.suffix in (".py", ".cpp", ".h"):
                found[f"{root.name}/{'/'.join(parts)}"] = path
    return dict(sorted(found.items()))


def digest_of(files: dict[str, Path]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def sources() -> str:
    """The digest of the sources that this process runs."""
    return digest_of(source_files())
