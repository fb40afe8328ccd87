"""A student's closed-form start: block `u`, then the residual affine map that best takes `X_u` to `X_v`.

Block `u` on `X_{u-1}` gives the teacher's own `X_u`, so the map is a least-squares fit between two boundaries of the
teacher, and needs only sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ppcl.architecture import Streams
from ppcl.distillation.mesh import Mesh
from ppcl.probes import Statistics, affine_fit
from ppcl.segments import Chain
from ppcl.students import Student

if TYPE_CHECKING:
    from ppcl.distillation.run import Samples, Segment


def fit_affine_starts(
    segment: Segment,
    students: Sequence[Student],
    samples: Samples,
    ids: np.ndarray,
    batch_size: int,
    ridge: float,
    mesh: Mesh,
    chain: Chain,
) -> None:
    """Set the affine maps of `students`, from one pass of the whole pipeline over the samples `ids`.

    Every rank takes part, also one without students, since the streams pass through it.
    """
    from ppcl.distillation.run import text_mask

    boundaries = {s.interval.first + 1 for s in students} | {s.interval.last + 1 for s in students}
    sums = {
        (s.interval, name): Statistics(linear.in_features, linear.out_features)
        for s in students
        for name, linear in s.affine.items()
    }
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size][mesh.replica :: mesh.dp]
        if not len(rows):
            continue
        inputs = samples.batch(rows, segment.device, segment.dtype)
        kept, context = segment.run(inputs, chain, boundaries)
        mask = text_mask(segment.architecture, context)
        for (interval, name), statistics in sums.items():
            x = _tokens(kept[interval.first + 1], name, mask)
            statistics.update(x, _tokens(kept[interval.last + 1], name, mask) - x)
    chain.flush()
    for student in students:
        for name, linear in student.affine.items():
            solved = affine_fit(_merged(sums[student.interval, name], mesh), ridge)
            with torch.no_grad():
                linear.weight.copy_(solved.weight)
                linear.bias.copy_(solved.bias)


def _tokens(streams: Streams, name: str, mask: torch.Tensor | None) -> torch.Tensor:
    """A stream's tokens `(n, d)` that are no padding, float32."""
    x = getattr(streams, name).float()
    return x[mask] if name == "txt" and mask is not None else x.flatten(0, 1)


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
