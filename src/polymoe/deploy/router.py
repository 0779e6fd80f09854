"""Ray Serve's request router over `Ranking`. The only file that knows this alpha interface of Ray's."""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from polymoe.deploy.ranking import Ranking


class ResidencyRouter(MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica that has its variant in a slot, unless another one is done with it sooner.

    Requests do not go through Ray, so that it does not know how many a replica has: the ingress says how many of its
    own (`work`), replicas how many there are in all. What is first here is taken.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranking = Ranking()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or "work" not in pending_request.kwargs:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        asked, now = pending_request.kwargs, time.time()
        self._ranking.forget(by_name)
        queues = []
        for name, replica in by_name.items():
            own = asked["work"].get(name, 0)
            if "slots" in (stats := replica.routing_stats or {}):
                self._ranking.report(name, stats["slots"], stats["loaded"], stats["taken_at"], stats["work"] - own)
            queues.append((name, own))
        variant = pending_request.metadata.multiplexed_model_id
        order = self._ranking.order(queues, variant, asked["prefix"], now)
        order.sort(key=lambda name: name in asked["avoid"])
        self._ranking.chosen(order[0], variant, asked["prefix"], now)
        return [[by_name[name]] for name in order]
