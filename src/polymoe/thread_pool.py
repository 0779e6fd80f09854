"""Threads for work on many weights, where torch's own threads would wait for each other at every operation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each of which runs an operation alone."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)  # what threads that start later take over
