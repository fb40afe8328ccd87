"""The torch process group of a Ray Train worker group, over the addresses by which Ray's nodes reach each other."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_listen_at_the_nodes_address)
        super().on_start(worker_group, backend_config)


class GroupConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _listen_at_the_nodes_address() -> None:
    """Gloo listens where the machine's own name leads, which often is a loopback that no other node reaches."""
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def free_resources() -> None:
    """Remove this job's placement groups: Ray Train leaves that of a worker group which fails while it starts."""
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for identity, group in placement_group_table().items():
        # The end of a group's id is its job's.
        if identity.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
