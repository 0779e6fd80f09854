"""Ray Serve's request router over `Ranking`. The only file that knows this alpha interface of Ray's."""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import MultiplexMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from polymoe.deploy.ranking import Ranking


class ResidencyRouter(MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica that has its variant in a slot, unless another one is done with it sooner.

    Without Ray's FIFO mixin, which hands a chosen replica to whichever request waits longest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranking = Ranking()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._ranking.forget(by_name)
        queues = []
        for name, replica in by_name.items():
            stats = replica.routing_stats or {}
            if "slots" in stats:
                self._ranking.report(name, stats["slots"], stats["loaded"], stats["taken_at"])
            queues.append((name, self.replica_queue_len_cache.get(replica.replica_id) or 0))
        order = self._ranking.order(queues, *_asked(pending_request), time.time())
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        del result
        self._ranking.chosen(replica_id.unique_id, *_asked(pending_request), time.time())


def _asked(pending_request: PendingRequest) -> tuple[str, str]:
    """(variant, name of the prompt's beginning)."""
    return pending_request.metadata.multiplexed_model_id, pending_request.kwargs.get("prefix", "")
