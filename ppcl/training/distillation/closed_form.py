"""Closed-form initialisation: least-squares problems between tensors of the teacher.

They need moments only, which come from passes over the samples. A batch goes through the segment block by block, and
what a block leaves is counted and dropped at once, so memory holds the hidden units of one block, not of all. Moments
that do not fit together are gathered in several passes, each over some of the replacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ppcl.config.schema import Distillation
from ppcl.linalg import Moments
from ppcl.training.captured import CapturedActivations
from ppcl.training.distillation.objectives import DistillationObjective, Solutions
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import Consumer

# Runs the teacher on some samples and hands what consumers need to them, block by block.
Stream = Callable[[np.ndarray, Sequence[Consumer]], None]
_BYTES = 8  # of a float64
# Steps of progress for an elimination of hidden units or heads; any other solution is one.
_ELIMINATION = 100


class ClosedForm:
    """The closed-form initialisation of one rank's objectives.

    Cost: `O(n p (p + q))` for `n` tokens and maps `p → q`, then `O(p³)` each. Memory: `O(p (p + q))` for each map of a
    pass, at most `settings.moments_gb` together, unless one objective alone needs more.
    """

    def __init__(self, objectives: Sequence[DistillationObjective], settings: Distillation, run: RunContext):
        self.settings, self.run, self.dims = settings, run, run.dims
        self.passes = list(_passes(objectives, settings.moments_gb * 1e9))

    def fit(self, stream: Stream, ids: np.ndarray, finished: Callable[[DistillationObjective], None]) -> None:
        """Initialise all objectives from passes of the whole pipeline over the samples `ids`.

        Every rank takes part in every pass, also one without objectives, since the streams pass through it.
        `finished(objective)` is called as soon as one is initialised.
        """
        count = self.dims.maximum(len(self.passes))
        for number in range(count):
            objectives = self.passes[number] if number < len(self.passes) else []
            moments = self._gather(objectives, stream, ids, number, count)
            self._solve(objectives, moments, number, count, finished)

    def _gather(
        self, objectives: Sequence[DistillationObjective], stream: Stream, ids: np.ndarray, number: int, count: int
    ) -> dict[str, Moments]:
        """One pass over the samples: the moments by name, merged over the replicas."""
        shapes = {name: shape for objective in objectives for name, shape in objective.moments().items()}
        moments = {name: Moments(*shape, device=self.run.device) for name, shape in shapes.items()}
        counted: set[str] = set()

        def consumer(objective: DistillationObjective) -> Consumer:
            def count_tokens(captured: CapturedActivations) -> None:
                for name, x, y in objective.updates(captured):
                    # Objectives may share some.
                    if name not in counted:
                        counted.add(name)
                        moments[name].update(x, y)

            return Consumer(objective.init_capture, count_tokens)

        consumers = [consumer(objective) for objective in objectives if objective.moments()]
        size = self.settings.batch_size
        for start in range(0, len(ids), size):
            rows = ids[start : start + size][self.dims.dp_rank :: self.dims.dp]
            counted.clear()
            if len(rows):
                stream(rows, consumers)
            done = number * len(ids) + min(start + size, len(ids))
            self.run.report(done, count * len(ids), {}, phase="closed form: moments")
        return {name: _merged(own, self.dims) for name, own in moments.items()}

    def _solve(
        self,
        objectives: Sequence[DistillationObjective],
        moments: dict[str, Moments],
        number: int,
        count: int,
        finished: Callable[[DistillationObjective], None],
    ) -> None:
        widths: dict[str, set[int]] = {}
        for objective in objectives:
            for name, width in objective.kept_units().items():
                widths.setdefault(name, set()).add(width)
        phase = f"closed form: solving, pass {number + 1} of {count}" if count > 1 else "closed form: solving"
        # An elimination takes far longer than anything else, minutes at 12,288 units on a CPU.
        total = _ELIMINATION * len(widths) + len(objectives)
        done, eliminated = 0, 0.0

        def report(eliminations: float) -> None:
            nonlocal eliminated
            eliminated = eliminations
            self.run.report(done + round(_ELIMINATION * eliminated), total, {}, phase=phase)

        solutions = Solutions(moments, self.settings.ridge, widths, report)
        for objective in objectives:
            objective.initialize(solutions)
            finished(objective)
            done += 1
            report(eliminated)


def _passes(objectives: Sequence[DistillationObjective], most: float) -> Iterator[list[DistillationObjective]]:
    """Objectives in the order of the first block they read, cut into passes whose moments take at most `most` bytes."""
    batch: list[DistillationObjective] = []
    names: dict[str, int] = {}
    for objective in sorted(objectives, key=lambda one: one.init_capture.first_block):
        sizes = {name: _BYTES * p * (p + q) for name, (p, q) in objective.moments().items()}
        if batch and sum((names | sizes).values()) > most:
            yield batch
            batch, names = [], {}
        batch.append(objective)
        names |= sizes
    if batch:
        yield batch


def _merged(own: Moments, dims: ParallelDims) -> Moments:
    """The moments over all replicas: sums about the common mean, added up, the same on all."""
    if dims.dp == 1:
        return own
    counts = dims.all_reduce(torch.tensor([own.n, own.dropped], dtype=torch.float64, device=own.xx.device))
    total = max(int(counts[0]), 1)
    x_mean, y_mean = (dims.all_reduce(mean * (own.n / total)) for mean in (own.x_mean, own.y_mean))
    dx, dy = own.x_mean - x_mean, own.y_mean - y_mean
    merged = Moments(0, 0, own.xx.device)
    merged.n, merged.dropped, merged.x_mean, merged.y_mean = int(counts[0]), int(counts[1]), x_mean, y_mean
    merged.xx = dims.all_reduce(own.xx.addr_(dx, dx, alpha=own.n))
    merged.xy = dims.all_reduce(own.xy.addr_(dx, dy, alpha=own.n))
    merged.yy = dims.all_reduce(own.yy.add_(dy.square(), alpha=own.n))
    return merged
