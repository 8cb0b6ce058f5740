"""Which replica gets a request, as Ray Serve asks for it."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from lmdeploy_jax.proxy.nodes import Node, by_prefix


class PrefixRouter(RequestRouter):
    """The proxy's `prefix`, which keeps a conversation where its cached pages are. Replicas that have
    refused the request come last.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Part of Ray's interface: the replicas in ranks, the best first."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        asked = pending_request.args[0]
        left = {self._node(replica): replica for replica in candidate_replicas}
        ranks: list[list[RunningReplica]] = []
        while left:
            ranks.append([left.pop(by_prefix(list(left), asked.prefix))])
        return sorted(ranks, key=lambda rank: rank[0].replica_id.unique_id in asked.refused)

    def _node(self, replica: RunningReplica) -> Node:
        unfinished = self.replica_queue_len_cache.get(replica.replica_id)
        return Node(replica.replica_id.unique_id, (), unfinished=unfinished or 0)
