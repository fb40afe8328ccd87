"""Nodes that a cluster's autoscaler adds when they are asked for, and what it says of what was asked.

Resources are requested by a placement group that waits for them, not by `ray.autoscaler.sdk.request_resources`: of
those requests a cluster keeps one, which Ray Data and Ray Train overwrite with theirs, and which stays when its job is
killed.
Only version 2 of the autoscaler (that of KubeRay and `ray up`) reports what can never come, and only for what has been
requested: what could be added can be read nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module without types
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

# An autoscaler looks every few seconds; one that only starts, in a container of its own, may take longer. Seconds.
_VERDICT = 60.0
_ANSWER = 10.0

Bundles = list[dict[str, float]]


def runs() -> bool:
    """Whether the cluster was started for an autoscaler of version 2."""
    return is_autoscaler_v2(fetch_from_server=True)


@contextmanager
def asked(bundles: Bundles) -> Iterator[PlacementGroup]:
    """Request these resources together within a `with` block; nodes that come stay until they are idle for long."""
    group = placement_group(bundles)
    try:
        yield group
    finally:
        remove_placement_group(group)


def can_have(bundles: Bundles) -> bool | None:
    """Whether the autoscaler can provide these resources together; asking lets it launch them.

    None where it does not say: it is silent, or others may use what is missing. Where no autoscaler runs, False.
    """
    if not runs():
        return False
    with asked(bundles) as group:
        # Each look at the cluster's state has a number, and the autoscaler tells the number of its last look.
        first = _status().cluster_resource_state.cluster_resource_state_version
        deadline = time.monotonic() + _VERDICT
        while time.monotonic() < deadline:
            if group.wait(0.5):
                return True
            said = _status().autoscaling_state
            if said.last_seen_cluster_resource_state_version <= first:
                continue
            impossible = [one.details for one in said.infeasible_gang_resource_requests]
            if not any(details.startswith(group.id.hex()) for details in impossible):
                return True
            return None if _in_use(bundles) else False
    return None


def launching() -> bool:
    """Whether the autoscaler has nodes on their way."""
    said = _status().autoscaling_state
    return bool(said.pending_instances or said.pending_instance_requests)


def _in_use(bundles: Bundles) -> bool:
    free, all_ = ray.available_resources(), ray.cluster_resources()
    return any(free.get(kind, 0) < all_.get(kind, 0) for kind in {kind for bundle in bundles for kind in bundle})


def _status() -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(
        GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=_ANSWER)
    )
    return reply
