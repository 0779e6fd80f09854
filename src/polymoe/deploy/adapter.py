"""What is used of Ray Serve beside its documented interface, beside the request router (`router.py`)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def pick(handle: DeploymentHandle, **asked: Any) -> AbstractAsyncContextManager[Any]:
    """The replica that the pool's request router names first, as Ray's `ReplicaSelection`. `asked` is for the router.

    Without a reservation, which is two calls to the replica: engines refuse for themselves.
    """
    picked: AbstractAsyncContextManager[Any] = handle.choose_replica(**asked, _reserve=False)
    return picked


def with_version(deployment: Any, version: str) -> Any:
    """Only another version makes Ray replace running replicas; by itself it takes every deployment for a new one."""
    deployment._version = version
    return deployment
