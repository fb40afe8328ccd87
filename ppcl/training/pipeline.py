"""Segments: contiguous parts of the teacher, one a rank, and the streams that travel between them.

Distillation and probing are forward-only pipelines: a rank receives the streams from the rank before, runs its own
blocks, sends on at once, and works on what it saw. No gradient crosses a boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from ppcl.errors import UserError
from ppcl.models import Streams

# Sends under way before the oldest is waited for: enough to overlap, and a bound on memory.
IN_FLIGHT = 2


def balanced_segments(costs: Sequence[float], pp: int, indivisible: Iterable[range] = ()) -> list[range]:
    """Cut the blocks into `pp` contiguous, non-empty ranges whose most expensive one costs as little as possible.

    `costs`: one number per block. `indivisible`: runs of blocks that no cut may fall into. Raises `UserError` where
    there are too few places to cut.
    """
    count = len(costs)
    inside = {block for blocks in indivisible for block in blocks[1:]}
    cuts = [block for block in range(1, count) if block not in inside]
    most = len(cuts) + 1
    if pp > most:
        raise UserError(
            f"pipeline is {pp}, but {count} blocks with these intervals can be cut into {most} segments at most; "
            f"set distillation.pipeline_parallel to {most} or less"
        )
    places = [0, *cuts, count]
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[n][j]: the first n segments end at places[j]; the cost of the most expensive, and where the last begins.
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
    """One rank's ends of the pipeline: receives streams from the rank before and sends them to the rank after.

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
        received = _mapped(torch.empty_like, like)
        for x in _tensors(received):
            dist.recv(x, src=self.rank - 1)
        return received

    def send(self, streams: Streams) -> None:
        """Send on without waiting for the next rank to take it."""
        if self.pp_rank == self.pp - 1:
            return
        streams = _mapped(torch.Tensor.contiguous, streams)
        works = [dist.isend(x, dst=self.rank + 1) for x in _tensors(streams)]
        self.bytes_sent += sum(x.nbytes for x in _tensors(streams))
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


def _tensors(streams: Streams) -> list[torch.Tensor]:
    return [x for x in streams if x is not None]


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], streams: Streams) -> Streams:
    return Streams(function(streams.img), None if streams.txt is None else function(streams.txt))
