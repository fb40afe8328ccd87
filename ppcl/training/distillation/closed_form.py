"""The closed-form start of everything that has one: a least-squares problem between tensors of the teacher.

It needs only sums, so it comes from one pass over the samples, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ppcl.linalg import Statistics
from ppcl.training.captured import Seen
from ppcl.training.distillation.objectives import Lesson
from ppcl.training.parallel_dims import Mesh


def fit_starts(
    lessons: Sequence[Lesson], seen: Callable[[np.ndarray], Seen], ids: np.ndarray, batch_size: int, ridge: float, mesh: Mesh
) -> None:
    """Set `lessons` to their closed-form starts, from one pass of the whole pipeline over the samples `ids`.

    `seen(rows)` runs the teacher on some of them. Every rank takes part, also one without lessons, since the streams pass
    through it.
    """
    shapes = {name: shape for lesson in lessons for name, shape in lesson.sums().items()}
    sums = {name: Statistics(*shape) for name, shape in shapes.items()}
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size][mesh.replica :: mesh.dp]
        if not len(rows):
            continue
        now = seen(rows)
        counted = set()
        for lesson in lessons:
            for name, x, y in lesson.fits(now):
                if name not in counted:
                    sums[name].update(x, y)
                    counted.add(name)
    merged = {name: _merged(statistics, mesh) for name, statistics in sums.items()}
    for lesson in lessons:
        lesson.start(merged, ridge)


def _merged(statistics: Statistics, mesh: Mesh) -> Statistics:
    """The replicas' sums, merged in the order of the replicas, so that all have the same."""
    if mesh.dp == 1:
        return statistics
    tensors = statistics.to_tensors()
    del tensors["parts"]  # no part is counted twice here: the samples are split between the replicas
    gathered = {name: mesh.gather(tensor) for name, tensor in tensors.items()}
    merged = Statistics(*statistics.xy.shape)
    for replica in range(mesh.dp):
        mine = {name: parts[replica] for name, parts in gathered.items()} | {"parts": torch.zeros(0)}
        merged.merge(Statistics.from_tensors(mine))
    return merged
