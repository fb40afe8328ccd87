"""Fit the linear probes of one rank's segment: one pass over the teacher, moments of its streams, held-out tokens.

    receive X from the rank before → run the segment's blocks, adding streams to their moments → send X on

Boundary `b` is the input of block `b`; the output of the last block of all is boundary `M`. A rank keeps held-out
tokens of the boundaries behind its own blocks, the first rank those of `X_0` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ppcl.config.schema import Probes
from ppcl.errors import UserError
from ppcl.linalg.affine_fit import Probe
from ppcl.linalg.moments import Moments
from ppcl.models import Streams, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import write_atomically
from ppcl.storage.tensor_files import to_bytes
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, spread_samples
from ppcl.training.pipeline import PipelineStage, balanced_segments
from ppcl.training.run_context import Precision, RunContext
from ppcl.training.teacher_segment import TeacherSegment, text_mask


def probe_file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:02d}.safetensors"


def tokens_file(folder: Path, boundary: int) -> Path:
    return folder / f"tokens-{boundary:02d}.safetensors"


def fit_tokens_file(folder: Path, boundary: int) -> Path:
    return folder / f"fit-tokens-{boundary:02d}.safetensors"


def fit_probes(
    teacher: Teacher,
    samples: Samples,
    settings: Probes,
    run: RunContext,
    tokens: int,
    fit_tokens: int = 0,
    precision: Precision = "auto",
) -> None:
    """Fit the probes of this rank's blocks and write them, and tokens behind them, to `run.folder`.

    `tokens`: how many held-out tokens of a stream are enough, over all samples; `fit_tokens`: the same of the samples
    that are fitted on, in the precision of the streams. Memory: `16 d²` bytes a stream and block and as much for its
    FFN, and `4 d` bytes a kept token and boundary.
    """
    dims, device, folder = run.dims, run.device, run.folder
    count = teacher.adapter.block_ranges(teacher.empty_transformer())[-1].stop
    part = balanced_segments([1.0] * count, dims.pp)[dims.pp_rank]
    segment = TeacherSegment(teacher, part, [], device, run.dtype(precision))
    pipeline_stage = PipelineStage(dims.pp_rank, dims.pp, dims.rank)
    fitted, held_out = samples.ids("train"), samples.ids("validation")
    total = len(fitted) + len(held_out)

    # By block and stream; those of an FFN's own map are called `ffn_img` and `ffn_txt`.
    sums: dict[tuple[int, str], Moments] = {}
    ffns = CaptureSpec(residuals=frozenset(part))
    wanted = range(part.start if dims.pp_rank == 0 else part.start + 1, part.stop + 1)
    to_fit = _KeptTokens(wanted, settings.tokens_per_sample, run.seed)
    kept_samples = -(-fit_tokens // settings.tokens_per_sample)
    kept_ids = set(spread_samples(fitted, kept_samples).tolist() if kept_samples else ())
    for start in range(0, len(fitted), settings.batch_size):
        before = None
        ids = fitted[start : start + settings.batch_size]
        for boundary, streams, captured in _walk(segment, pipeline_stage, samples, ids, ffns):
            if before is not None:
                _add(sums, boundary - 1, before, streams, captured, start, device)
            before = streams
            to_fit.add(boundary, streams, captured, ids, [id in kept_ids for id in ids.tolist()])
        run.report(min(start + settings.batch_size, len(fitted)), total, {})
    for block in part:
        # Taken out, so that they are gone when the held-out tokens come.
        moments_of = {name: sums.pop((block, name)) for b, name in list(sums) if b == block}
        _write_probe(folder, block, moments_of, settings.ridge)

    if fit_tokens:
        to_fit.write(lambda boundary: fit_tokens_file(folder, boundary))
    compared = _KeptTokens(wanted, tokens_per_sample(settings, len(held_out), tokens), run.seed, torch.float32)
    for start in range(0, len(held_out), settings.batch_size):
        ids = held_out[start : start + settings.batch_size]
        for boundary, streams, captured in _walk(segment, pipeline_stage, samples, ids, CaptureSpec()):
            compared.add(boundary, streams, captured, ids)
        run.report(len(fitted) + min(start + settings.batch_size, len(held_out)), total, {})
    compared.write(lambda boundary: tokens_file(folder, boundary))
    pipeline_stage.flush()
    dims.barrier()


class _KeptTokens:
    """Some tokens of every sample at some boundaries, on the host: the same ones at every boundary."""

    def __init__(self, boundaries: range, per_sample: int, seed: int, dtype: torch.dtype | None = None):
        """`dtype`: what they are kept in; None: the streams' own."""
        self.boundaries, self.per_sample, self.seed, self.dtype = boundaries, per_sample, seed, dtype
        self.parts: dict[tuple[int, str], list[torch.Tensor]] = {}

    def add(
        self,
        boundary: int,
        streams: Streams,
        captured: CapturedActivations,
        ids: np.ndarray,
        rows: Sequence[bool] | None = None,
    ) -> None:
        """Keep tokens of a batch at a boundary; `rows`: whether of a sample any are kept, None: of all."""
        if boundary not in self.boundaries or (rows is not None and not any(rows)):
            return
        for name, x in streams._asdict().items():
            if x is not None:
                chosen = _chosen(x, name, captured.text_mask, ids, self.per_sample, self.seed, rows)
                self.parts.setdefault((boundary, name), []).append(chosen.to("cpu", self.dtype or x.dtype))

    def write(self, path_of: Callable[[int], Path]) -> None:
        """One file a boundary, one tensor `(n, d)` a stream."""
        for boundary in self.boundaries:
            _save(path_of(boundary), {n: torch.cat(parts) for (b, n), parts in self.parts.items() if b == boundary}, {})


def tokens_per_sample(settings: Probes, samples: int, tokens: int) -> int:
    """Tokens of a stream to keep of each of so many samples, of which `tokens` together are enough."""
    return min(settings.tokens_per_sample, -(-tokens // max(samples, 1)))


@torch.no_grad()
def _walk(
    segment: TeacherSegment, pipeline_stage: PipelineStage, samples: Samples, ids: np.ndarray, wanted: CaptureSpec
) -> Iterator[tuple[int, Streams, CapturedActivations]]:
    """One batch through the segment: each boundary, its streams, what was captured inside of the block before it.

    Never more than one boundary is kept here.
    """
    start, context = embed(segment.transformer, samples.batch(ids, segment.device, segment.dtype))
    streams = pipeline_stage.receive(start)
    mask = text_mask(segment.adapter, context)
    captured = CapturedActivations(context=context, text_mask=mask)
    yield segment.range.start, streams, captured
    for number, block in segment.blocks.items():
        with segment.listening(captured, wanted):
            streams = run_blocks(segment.adapter, [block], streams, context, number)
        if number + 1 == segment.range.stop:
            pipeline_stage.send(streams)
        yield number + 1, streams, captured
        captured.residuals.clear()


def _add(
    sums: dict[tuple[int, str], Moments],
    block: int,
    before: Streams,
    after: Streams,
    captured: CapturedActivations,
    part: int,
    device: str,
) -> None:
    """Update the moments of a block, and of its FFN alone, with one batch; of both streams."""
    pairs = {name: getattr(before, name) for name in Streams._fields}
    pairs |= {f"ffn_{name}": x for (_, name), x in captured.residuals.items()}
    for key, old in pairs.items():
        name = key.removeprefix("ffn_")
        new = getattr(after, name)
        if old is not None and new is not None:
            x = captured.tokens(old, name)
            moments = sums.setdefault((block, key), Moments(x.shape[-1], x.shape[-1], device))
            moments.update(x, captured.tokens(new, name) - x, part=part)


def _chosen(
    x: torch.Tensor,
    name: str,
    mask: torch.Tensor | None,
    ids: np.ndarray,
    most: int,
    seed: int,
    rows: Sequence[bool] | None,
) -> torch.Tensor:
    """At most `most` tokens of each sample, the same ones at every boundary, whatever the batches: `(n, d)`."""
    chosen = []
    for row, sample in enumerate(ids):
        if rows is not None and not rows[row]:
            continue
        length = x.shape[1]
        places = np.arange(length)
        if name == "txt" and mask is not None:
            places = places[mask[row].cpu().numpy()]
        order = np.random.default_rng([seed, int(sample)]).permutation(len(places))[:most]
        chosen.append(x[row, torch.as_tensor(np.sort(places[order]), device=x.device)])
    return torch.cat(chosen)


def _write_probe(folder: Path, block: int, moments_of: dict[str, Moments], ridge: float) -> None:
    """Solve a block's probes from the moments of its streams and write them. Raises `UserError` without tokens."""
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for name, moments in moments_of.items():
        try:
            probe, fit = Probe.fit(moments, ridge)
        except UserError as error:
            raise UserError(f"block {block}, {name} stream: {error}") from None
        if not name.startswith("ffn_"):
            tensors |= {f"{name}.weight": probe.weight, f"{name}.bias": probe.bias}
        metadata |= {f"{name}.tokens": str(fit.tokens), f"{name}.error": f"{fit.error:.6g}"}
        metadata |= {f"{name}.dropped": str(fit.dropped), f"{name}.underdetermined": str(fit.underdetermined)}
        # The map's squared error, against the variance of the stream it is added to.
        squared_error, variance = fit.error * float(moments.yy.sum()), float(moments.xx.diagonal().sum())
        metadata[f"{name}.wrong"] = f"{squared_error / variance if variance > 0 else 0.0:.6g}"
    _save(probe_file(folder, block), tensors, metadata)


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    write_atomically(path, to_bytes(tensors, metadata))


def ffn_error(path: Path) -> float | None:
    """The squared error of the closed-form maps of a block's FFNs, as a share of the stream's variance.

    The mean over the block's streams; None where the block has no FFN to replace.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    wrong = [float(metadata[f"ffn_{name}.wrong"]) for name in Streams._fields if f"ffn_{name}.wrong" in metadata]
    return sum(wrong) / len(wrong) if wrong else None


def has_text(path: Path) -> bool:
    """Whether a block's text stream has parts of its own, which a text run could do without."""
    with safe_open(path, "pt") as file:
        return "ffn_txt.wrong" in (file.metadata() or {})


def dropped(path: Path) -> int:
    """Tokens of a block, of the stream that lost more, which the fit in this file left out for NaN or Inf."""
    with safe_open(path, "pt") as file:
        return max(int(value) for name, value in file.metadata().items() if name.endswith(".dropped"))


def underdetermined(path: Path) -> int | None:
    """The fewest tokens of the fits in this file that had no more tokens than channels, so that the ridge decided.

    None where all had more.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    few = [
        int(metadata[name.replace(".underdetermined", ".tokens")])
        for name, value in metadata.items()
        if name.endswith(".underdetermined") and value == "True"
    ]
    return min(few, default=None)
