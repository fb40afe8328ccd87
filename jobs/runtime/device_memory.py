"""How much memory the devices of a cluster have."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from ppcl.sizing.fit import Place

# Seconds in which a node must have answered; without an answer nothing is known of it.
_PATIENCE = 60.0
_MEGABYTE = 1 << 20


def places(device: str) -> list[Place]:
    """The largest GPU of each node of the cluster, or the nodes where workers use CPUs.

    Empty where there is none yet, or where nobody can tell.
    """
    # Not by who only measures a node: it would import torch.
    from ppcl.sizing.fit import Place

    kind = "GPU" if device == "cuda" else "CPU"
    nodes = {
        node["NodeID"]: int(node["Resources"][kind])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get(kind)
    }
    measure = _gpu_bytes if device == "cuda" else _node_bytes
    here = ray.get_runtime_context().get_node_id()
    asked = {_on(node, measure): node for node in nodes if node != here}
    done, _ = ray.wait([*asked], num_returns=len(asked), timeout=_PATIENCE) if asked else ([], [])
    found = {here: measure()} if here in nodes else {}
    for answer in done:
        try:
            found[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError:  # the node left
            continue
    return [Place(size, None if kind == "GPU" else nodes[node]) for node, size in found.items() if size]


def _on(node: str, measure: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(measure).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote()


def _gpu_bytes() -> int | None:
    """Of this node's largest GPU, as its driver says; a process without a GPU of its own may ask, too."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
        return max(int(line) for line in said.split()) * _MEGABYTE
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _node_bytes() -> int:
    return psutil.virtual_memory().total
