"""What an operation runs on, and why not on something faster: decided when a model is loaded. Imports no torch."""

import msgspec


class FastPath(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of operation of `count` layers or modules that run alike.

    part: "experts", "linear", "norm", "attention", "layer" or "per-variant". runs_on: "compiled packed", "compiled
    stored", "compiled", "GPU kernels", "the stock module's operations" or a name that begins with "torch".
    reason: why not the fastest way; empty where it is.
    slow: whether that takes more than twice the time.
    """

    part: str
    runs_on: str
    count: int
    reason: str = ""
    slow: bool = False

    @property
    def is_compiled(self) -> bool:
        return not self.runs_on.startswith("torch")

    @property
    def warning(self) -> str:
        """What an operator should know where it is slow."""
        return f"the {self.part} of {self.count} layers run on {self.runs_on}, more than twice as slow: {self.reason}"

    def __str__(self) -> str:
        return f"{self.count} on {self.runs_on}" + (f" ({self.reason})" if self.reason else "")


def merged(paths: list[FastPath]) -> list[FastPath]:
    """Those that say the same as one, in the order of their first."""
    counts: dict[FastPath, int] = {}
    for path in paths:
        alike = msgspec.structs.replace(path, count=0)
        counts[alike] = counts.get(alike, 0) + path.count
    return [msgspec.structs.replace(path, count=count) for path, count in counts.items()]
