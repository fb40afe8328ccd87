"""Closed-form initialisation: least-squares problems between tensors of the teacher.

They need moments only, so they come from one pass over the samples, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ppcl.linalg import Moments
from ppcl.training.captured import CapturedActivations
from ppcl.training.distillation.objectives import DistillationObjective
from ppcl.training.parallel_dims import ParallelDims


def fit_closed_form(
    objectives: Sequence[DistillationObjective],
    captured: Callable[[np.ndarray], CapturedActivations],
    ids: np.ndarray,
    batch_size: int,
    ridge: float,
    dims: ParallelDims,
) -> None:
    """Set `objectives` to their closed-form initialisation, from one pass of the whole pipeline over the samples `ids`.

    `captured(rows)` runs the teacher on some of them. Every rank takes part, also one without objectives, since the
    streams pass through it. Cost: `O(n p (p + q))` for `n` tokens and maps `p → q`; memory `O(p (p + q))` for each
    name.
    """
    shapes = {name: shape for objective in objectives for name, shape in objective.moments().items()}
    moments = {name: Moments(*shape) for name, shape in shapes.items()}
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size][dims.dp_rank :: dims.dp]
        if not len(rows):
            continue
        batch = captured(rows)
        counted = set()
        for objective in objectives:
            for name, x, y in objective.updates(batch):
                if name not in counted:
                    moments[name].update(x, y)
                    counted.add(name)
    merged = {name: _merged(statistics, dims) for name, statistics in moments.items()}
    for objective in objectives:
        objective.initialize(merged, ridge)


def _merged(statistics: Moments, dims: ParallelDims) -> Moments:
    """The replicas' sums, merged in the order of the replicas, so that all have the same."""
    if dims.dp == 1:
        return statistics
    tensors = statistics.to_tensors()
    del tensors["parts"]  # no part is counted twice here: the samples are split between the replicas
    gathered = {name: dims.all_gather(tensor) for name, tensor in tensors.items()}
    merged = Moments(*statistics.xy.shape)
    for replica in range(dims.dp):
        mine = {name: parts[replica] for name, parts in gathered.items()} | {"parts": torch.zeros(0)}
        merged.merge(Moments.from_tensors(mine))
    return merged
