"""Autoscaling: the number of replicas by backlog.

Ray Serve's controller runs this module, so it imports the standard library alone.

Work is counted in device-seconds at undegraded quality, refused requests included. Under load `auto` uses smaller
variants; if the load were counted with those, degrading would hide the load that more replicas would take.
"""

from __future__ import annotations

from typing import Any

BACKLOG = "backlog_seconds"


class BacklogPolicy:
    """Wants as many replicas as keep each backlog at `target_seconds`. Ray Serve adds delays and bounds."""

    def __init__(self, target_seconds: float):
        self.target_seconds = target_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        backlogs = (context.aggregated_metrics or {}).get(BACKLOG)
        if not backlogs:
            # No replica has reported yet.
            return context.target_num_replicas, {}
        return sum(backlogs.values()) / self.target_seconds, {}
