"""Segments: contiguous parts of the teacher, one a rank, and the streams that travel between them.

Distillation and probing are forward-only pipelines: a rank receives the streams from the rank before, runs its own
blocks, sends on at once, and works on what it saw. No gradient crosses a boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ppcl.errors import UserError
from ppcl.models import Streams
from ppcl.replacements import Interval

# Sends under way before the oldest is waited for: enough to overlap, and a bound on memory.
IN_FLIGHT = 2


def balanced_segments(costs: Sequence[float], pp: int, uncuttable: Sequence[Interval] = ()) -> list[range]:
    """`pp` contiguous, non-empty ranges of blocks that minimise the dearest one's cost; no cut falls inside an interval.

    `costs`: one number a block. Raises `UserError` where there are fewer places to cut than cuts.
    """
    count = len(costs)
    inside = {block for interval in uncuttable for block in interval.blocks[1:]}
    cuts = [block for block in range(1, count) if block not in inside]
    if pp > len(cuts) + 1:
        raise UserError(
            f"pipeline is {pp}, but {count} blocks with these intervals can be cut into {len(cuts) + 1} segments at most; "
            f"set distillation.pipeline_parallel to {len(cuts) + 1} or less"
        )
    places = [0, *cuts, count]
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[n][j]: the least dearest segment when the first n segments end at places[j].
    best = [{0: (0.0, 0)}]
    for n in range(1, pp + 1):
        row = {}
        for j in range(n, len(places)):
            row[j] = min(
                (max(worst, total[places[j]] - total[places[i]]), i) for i, (worst, _) in best[n - 1].items() if i < j
            )
        best.append(row)
    ends, j = [], len(places) - 1
    for n in range(pp, 0, -1):
        ends.append(places[j])
        j = best[n][j][1]
    ends.reverse()
    return [range(a, b) for a, b in zip([0, *ends], ends)]


class PipelineStage:
    """One rank's ends of the pipeline: streams come from the rank before and go to the rank after.

    `pp_rank` counts from 0 to `pp - 1`; in a `(dp, pp)` mesh neighbours have neighbouring global ranks, `rank` being
    this one's. With `pp = 1` nothing is sent, and no process group is needed.
    """

    def __init__(self, pp_rank: int, pp: int, rank: int = 0):
        self.pp_rank, self.pp, self.rank = pp_rank, pp, rank
        self._under_way: deque[tuple[list, Streams]] = deque()
        self.bytes_sent = 0

    def receive(self, like: Streams) -> Streams:
        """The streams of the rank before, shaped like `like`; on the first rank `like` itself, which is `X_0`."""
        if self.pp_rank == 0:
            return like
        received = Streams(*(None if x is None else torch.empty_like(x) for x in like))
        for x in received:
            if x is not None:
                dist.recv(x, src=self.rank - 1)
        return received

    def send(self, streams: Streams) -> None:
        """Send on without waiting for the next rank to take it."""
        if self.pp_rank == self.pp - 1:
            return
        streams = Streams(*(None if x is None else x.contiguous() for x in streams))
        works = [dist.isend(x, dst=self.rank + 1) for x in streams if x is not None]
        self.bytes_sent += sum(x.nbytes for x in streams if x is not None)
        # The tensors live until their sends are done.
        self._under_way.append((works, streams))
        while len(self._under_way) > IN_FLIGHT:
            self._finish_oldest()

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        works, _ = self._under_way.popleft()
        for work in works:
            work.wait()
