"""What one rank does to fit probes: its segment's blocks, one pass over the teacher, sums and a few held-out tokens.

    receive X from the rank before → run the segment's blocks, adding each one's streams to its sums → send X on

Boundary `b` is the input of block `b`; the output of the last block of all is boundary `M`. A rank keeps held-out tokens
of the boundaries behind its own blocks, the first rank those of `X_0` too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ppcl.architecture import Streams
from ppcl.config import Probes
from ppcl.distillation.mesh import Mesh
from ppcl.distillation.run import Samples, Segment, text_mask
from ppcl.probes.probe import Probe
from ppcl.probes.statistics import Statistics
from ppcl.segments import Chain, segments
from ppcl.teacher import Teacher


def probe_file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:02d}.safetensors"


def tokens_file(folder: Path, boundary: int) -> Path:
    return folder / f"tokens-{boundary:02d}.safetensors"


def fit(
    teacher: Teacher,
    samples: Samples,
    settings: Probes,
    mesh: Mesh,
    folder: Path,
    seed: int,
    device: str,
    dtype: torch.dtype,
    report: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Fit the probes of this rank's blocks and write them, and the held-out tokens behind them, to `folder`."""
    count = teacher.architecture.spans(teacher.empty_transformer())[-1].stop
    part = segments([1.0] * count, mesh.pp)[mesh.stage]
    segment = Segment(teacher, part, [], device, dtype)
    chain = Chain(mesh.stage, mesh.pp, mesh.rank)
    fitted, held_out = samples.ids(held_out=False), samples.ids(held_out=True)
    total = len(fitted) + len(held_out)
    boundaries = set(range(part.start, part.stop + 1))

    sums: dict[tuple[int, str], Statistics] = {}
    for start in range(0, len(fitted), settings.batch_size):
        kept, mask = _batch(segment, chain, samples, fitted[start : start + settings.batch_size], boundaries)
        for block in part:
            for name in Streams._fields:
                before, after = getattr(kept[block], name), getattr(kept[block + 1], name)
                if before is None or after is None:
                    continue
                x = _counted(before, name, mask)
                statistics = sums.setdefault((block, name), Statistics(x.shape[-1], x.shape[-1], device))
                statistics.update(x, _counted(after, name, mask) - x, part=start)
        report(min(start + settings.batch_size, len(fitted)), total, {})
    for block in part:
        _write_probe(folder, block, {n: s for (b, n), s in sums.items() if b == block}, settings.ridge)

    tokens: dict[tuple[int, str], list[torch.Tensor]] = {}
    wanted = boundaries if mesh.stage == 0 else boundaries - {part.start}
    for start in range(0, len(held_out), settings.batch_size):
        ids = held_out[start : start + settings.batch_size]
        kept, mask = _batch(segment, chain, samples, ids, boundaries)
        for boundary in wanted:
            for name in Streams._fields:
                x = getattr(kept[boundary], name)
                if x is not None:
                    chosen = _chosen(x, name, mask, ids, settings.tokens_per_sample, seed)
                    tokens.setdefault((boundary, name), []).append(chosen.float().cpu())
        report(len(fitted) + min(start + settings.batch_size, len(held_out)), total, {})
    for boundary in wanted:
        made = {n: torch.cat(parts) for (b, n), parts in tokens.items() if b == boundary}
        _save(tokens_file(folder, boundary), made, {})
    chain.flush()
    mesh.barrier()


def _batch(segment: Segment, chain: Chain, samples: Samples, ids: np.ndarray, boundaries: set[int]):
    kept, context = segment.run(samples.batch(ids, segment.device, segment.dtype), chain, boundaries)
    return kept, text_mask(segment.architecture, context)


def _counted(x: torch.Tensor, name: str, mask: torch.Tensor | None) -> torch.Tensor:
    """The tokens `(n, d)` of a stream that are no padding, float32."""
    return (x[mask] if name == "txt" and mask is not None else x.flatten(0, 1)).float()


def _chosen(
    x: torch.Tensor, name: str, mask: torch.Tensor | None, ids: np.ndarray, most: int, seed: int
) -> torch.Tensor:
    """At most `most` tokens of each sample, the same ones at every boundary, whatever the batches: `(n, d)`."""
    chosen = []
    for row, sample in enumerate(ids):
        length = x.shape[1]
        places = np.arange(length)
        if name == "txt" and mask is not None:
            places = places[mask[row].cpu().numpy()]
        order = np.random.default_rng([seed, int(sample)]).permutation(len(places))[:most]
        chosen.append(x[row, torch.as_tensor(np.sort(places[order]), device=x.device)])
    return torch.cat(chosen)


def _write_probe(folder: Path, block: int, sums: dict[str, Statistics], ridge: float) -> None:
    tensors, words = {}, {}
    for name, statistics in sums.items():
        probe, how = Probe.fit(statistics, ridge)
        tensors |= {f"{name}.weight": probe.weight, f"{name}.bias": probe.bias}
        words |= {f"{name}.tokens": str(how.tokens), f"{name}.error": f"{how.error:.6g}"}
        words |= {f"{name}.dropped": str(how.dropped), f"{name}.underdetermined": str(how.underdetermined)}
    _save(probe_file(folder, block), tensors, words)


def _save(path: Path, tensors: dict[str, torch.Tensor], words: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, words)
    os.replace(partial, path)
