"""Some of many, at even distances."""

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """At most `limit` of them, the first and the last among them."""
    count = min(limit, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]
