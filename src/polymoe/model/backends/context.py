"""The one thing that stacks, pool and attention share: the batch of the current forward pass, and what computes it.

transformers hands keyword arguments to attention only, not to projections, norms, routers or experts. So every
replaced weight of one model holds the same `ForwardContext`, and the runner sets its `batch` before each pass. There
is no module-level state: two models in one process have two contexts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from polymoe.model.backends.base import Backend
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.model.batch.batch import ForwardBatch


@dataclass
class ForwardContext:
    """The holder: one a model, set by the runner before each pass."""

    backend: Backend = field(default_factory=ReferenceBackend)
    _batch: ForwardBatch | None = field(default=None, repr=False)

    @property
    def batch(self) -> ForwardBatch:
        if self._batch is None:
            raise RuntimeError("no batch is set: the model is only called by its runner")
        return self._batch

    def set(self, batch: ForwardBatch | None) -> None:
        self._batch = batch

    @contextmanager
    def within(self, batch: ForwardBatch) -> Iterator[None]:
        """For as long as some of the pass's rows are a batch of their own."""
        whole, self._batch = self._batch, batch
        try:
            yield
        finally:
            self._batch = whole
