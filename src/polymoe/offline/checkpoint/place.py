"""Where a variant is: a checkpoint, and what is changed in it while it is read (`BASE+ADAPTER`, `BASE+PATCH`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.source import resolve


@dataclass(frozen=True)
class Place:
    """`folder`: the checkpoint. `changes`: folders of adapters and files of patches, in the order they are applied."""

    folder: Path
    changes: tuple[Path, ...] = ()

    @classmethod
    def find(cls, spec: str | Path) -> Self:
        """Raises `CheckpointError` for a part that is neither here nor on the Hub."""
        first, *rest = _parts(str(spec))
        return cls(resolve(first), tuple(_change(part) for part in rest))

    def __str__(self) -> str:
        return "+".join(map(str, (self.folder, *self.changes)))

    @property
    def files(self) -> list[Path]:
        """Every file that may decide what the variant is."""
        inside = [path for folder in (self.folder, *self.changes) if folder.is_dir() for path in folder.iterdir()]
        return [path for path in (*inside, *self.changes) if path.is_file()]


def _parts(spec: str) -> list[str]:
    r"""`a+b` -> ["a", "b"]; a path that exists may have a + of its own."""
    pieces = spec.split("+")
    for count in range(len(pieces), 1, -1):
        whole = "+".join(pieces[:count])
        if Path(whole).expanduser().exists():
            rest = "+".join(pieces[count:])
            return [whole, *(_parts(rest) if count < len(pieces) else [])]
    if not all(pieces):
        raise CheckpointError(f"{spec}: a part is empty; give BASE+ADAPTER or BASE+PATCH.")
    return [pieces[0], *(_parts("+".join(pieces[1:])) if pieces[1:] else [])]


def _change(spec: str) -> Path:
    path = Path(spec).expanduser()
    return path.resolve() if path.is_file() else resolve(spec)
