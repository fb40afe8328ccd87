"""Detection: the full table `cka(u, k)` of a teacher, and the intervals that Algorithm 1 reads from it.

From files of probes and held-out tokens, a boundary at a time: memory is two boundaries, not all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppcl.config.schema import Detection, Width
from ppcl.detection.cka import FEWEST_TOKENS, centred, hsic, ratio
from ppcl.detection.fit_probes import ffn_error, has_text, probe_file, tokens_file
from ppcl.detection.intervals import Table, differences, first_difference
from ppcl.errors import UserError
from ppcl.linalg.affine_fit import Probe
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, TextRun
from ppcl.storage.manifest import write_atomically

STREAMS = ("img", "txt")


def similarity_table(
    probes_folder: Path, blocks: int, stream: str, finite: torch.Tensor, tell: Callable[[int], None]
) -> tuple[Table, Table]:
    """`cka(u, k)` of one stream, plain and with z-scored channels; None for `k < u` and where the stream is gone.

    The surrogate starts from the teacher's own tokens after block `u` and goes through the probes of `u+1..k` (Eq. 3).
    `finite (n,)`: the tokens that count, the same ones behind every block.
    """
    plain: Table = [[None] * blocks for _ in range(blocks)]
    scored: Table = [[None] * blocks for _ in range(blocks)]
    chains: dict[int, torch.Tensor] = {}
    for k in range(blocks):
        tokens = load_file(tokens_file(probes_folder, k + 1)).get(stream)
        if tokens is None:
            break
        tokens = tokens[finite]
        weights = load_file(probe_file(probes_folder, k))
        probe = Probe(weights[f"{stream}.weight"], weights[f"{stream}.bias"])
        chains = {u: probe(x) for u, x in chains.items()} | {k: tokens}
        for table, standardize in ((plain, False), (scored, True)):
            teacher = centred(tokens, standardize)
            own = hsic(teacher, teacher)
            for u, x in chains.items():
                surrogate = centred(x, standardize)
                table[u][k] = 1.0 if u == k else ratio(hsic(teacher, surrogate), own, hsic(surrogate, surrogate))
        tell(k)
    return plain, scored


def finite_tokens(probes_folder: Path, blocks: int, stream: str) -> torch.Tensor:
    """`(n,)`, true for the held-out tokens of a stream that are finite behind every block.

    One that is not would make every similarity behind it unknown. Raises `UserError` where too few are left.
    """
    kept = (load_file(tokens_file(probes_folder, block + 1)).get(stream) for block in range(blocks))
    finite = torch.stack([x.isfinite().all(1) for x in kept if x is not None]).all(0)
    if not finite.all() and int(finite.sum()) < FEWEST_TOKENS:
        raise UserError(
            f"only {int(finite.sum())} of {len(finite)} held-out tokens of the {stream} stream are finite behind every "
            f"block, and CKA needs {FEWEST_TOKENS}; check the teacher's weights and precision and the calibration set"
        )
    return finite


def stream_map(probes_folder: Path, blocks: int, stream: str, finite: torch.Tensor) -> Table:
    """CKA between a stream behind block `r` and behind block `s`, both the teacher's own; None for `s < r`."""
    table: Table = [[None] * blocks for _ in range(blocks)]
    kept: dict[int, tuple[torch.Tensor, float]] = {}
    for s in range(blocks):
        tokens = load_file(tokens_file(probes_folder, s + 1)).get(stream)
        if tokens is None:
            break
        x = centred(tokens[finite], False)
        kept[s] = x, hsic(x, x)
        for r, (y, own) in kept.items():
            table[r][s] = 1.0 if r == s else ratio(hsic(x, y), kept[s][1], own)
    return table


def text_runs(table: Table, block_ranges: list[range], similarity: float) -> list[TextRun]:
    """From the first block on, the longest runs whose last text stream is that similar to their first one."""
    runs = []
    for span in block_ranges:
        first = span.start
        while first < span.stop:
            last = first
            while last + 1 < span.stop and (table[first][last + 1] or 0.0) >= similarity:
                last += 1
            if last > first:
                runs.append(TextRun(first, last))
            first = last + 1
    return runs


def detect(
    probes_folder: Path, block_ranges: list[range], settings: Detection, width: Width, tell: Callable[[int, int], None]
) -> dict[str, Any]:
    """The tables of both streams and their mean, Δ, and what can be replaced.

    `intervals`: those of two blocks or more. `text_map`: see `stream_map`. `ffn_errors`: by block, see
    `ppcl.detection.fit_probes.ffn_error`. `plan`: every replacement that is to be made. `left_out`: held-out tokens of
    each stream that were not finite.
    """
    blocks = block_ranges[-1].stop
    finite = {name: finite_tokens(probes_folder, blocks, name) for name in STREAMS}
    plain, scored = {}, {}
    for index, name in enumerate(STREAMS):

        def progress(block: int, done: int = index * blocks) -> None:
            tell(done + block + 1, 2 * blocks)

        plain[name], scored[name] = similarity_table(probes_folder, blocks, name, finite[name], progress)
    for tables in (plain, scored):
        tables["mean"] = [[_mean(a, b) for a, b in zip(*rows)] for rows in zip(tables["img"], tables["txt"])]
    delta = differences((scored if settings.standardize else plain)[settings.stream])
    intervals = [i for i in first_difference(delta, block_ranges) if i.removed]
    all_errors = {block: ffn_error(probe_file(probes_folder, block)) for block in range(blocks)}
    errors = {block: error for block, error in all_errors.items() if error is not None}
    ffns = sorted(errors, key=errors.__getitem__)[: width.linear_ffns]
    text_map = stream_map(probes_folder, blocks, "txt", finite["txt"]) if width.text else None
    runs = (
        text_runs(text_map, _apart(_with_text(probes_folder, block_ranges), intervals), width.text_similarity)
        if text_map is not None
        else []
    )
    pruned = [PrunedFfn(block, kept) for block in errors for kept in sorted(set(width.ffn_keep_percents), reverse=True)]
    low_rank = [LowRankModulation()] if width.low_rank_modulations else []
    return {
        "blocks": blocks,
        "spans": [[span.start, span.stop] for span in block_ranges],
        "stream": settings.stream,
        "standardize": settings.standardize,
        "method": settings.method,
        "left_out": {name: int((~rows).sum()) for name, rows in finite.items()},
        "cka": plain,
        "cka_standardized": scored,
        "delta": delta,
        "intervals": [[interval.first, interval.last] for interval in intervals],
        "text_map": text_map,
        "ffn_errors": errors,
        "plan": [
            str(replacement) for replacement in [*intervals, *runs, *map(LinearFfn, sorted(ffns)), *pruned, *low_rank]
        ],
    }


def _apart(block_ranges: list[range], intervals: list[Interval]) -> list[range]:
    """Block ranges cut at the borders of the intervals.

    A text run across a border would leave no place there to cut the teacher into the segments of a pipeline, since
    every replacement lies within one rank's segment.
    """
    borders = {border for interval in intervals for border in (interval.first, interval.last + 1)}
    parts = []
    for span in block_ranges:
        cuts = [span.start, *sorted(b for b in borders if span.start < b < span.stop), span.stop]
        parts += [range(a, b) for a, b in zip(cuts, cuts[1:])]
    return parts


def _with_text(probes_folder: Path, block_ranges: list[range]) -> list[range]:
    """The ranges of blocks whose text stream has parts of its own: no single-stream block, and none that drops it."""
    ranges = []
    for span in block_ranges:
        own = [b for b in span if has_text(probe_file(probes_folder, b))]
        if own:
            ranges.append(range(own[0], own[-1] + 1))
    return ranges


def _mean(a: float | None, b: float | None) -> float | None:
    """Of the streams that are there: a last block may have no text."""
    there = [x for x in (a, b) if x is not None]
    return sum(there) / len(there) if there else None


def write_detection(folder: Path, detection: dict[str, Any]) -> None:
    write_atomically(folder / "detection.json", json.dumps(detection))
