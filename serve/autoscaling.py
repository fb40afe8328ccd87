"""How many replicas there should be, by the work that waits. Runs in Ray Serve's controller: the standard library alone.

The work is counted in device-seconds at undegraded quality, refused requests included: under load `auto` generates with smaller
variants, and if that counted, degrading would hide the load that more replicas would take away.
"""

from __future__ import annotations

from typing import Any

BACKLOG = "backlog_seconds"


class BacklogPolicy:
    """As many replicas as keep each one's backlog at `target_seconds`. Ray Serve adds the delays and the bounds."""

    def __init__(self, target_seconds: float):
        self.target_seconds = target_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        waiting = (context.aggregated_metrics or {}).get(BACKLOG)
        if not waiting:
            # No replica has told anything yet.
            return context.target_num_replicas, {}
        return sum(waiting.values()) / self.target_seconds, {}
