"""Detection: the full table `cka(u, k)` of a teacher, and the intervals that Algorithm 1 reads from it.

From the files of probes and held-out tokens that the stage before left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppcl.config.schema import Detection, Width
from ppcl.detection.cka import FEWEST_TOKENS
from ppcl.detection.fit_probes import ffn_error, has_text, probe_file, tokens_file
from ppcl.detection.intervals import Table, differences, first_difference
from ppcl.detection.selection import evenly, threshold
from ppcl.detection.similarity import Similarity, TableSpec, stream_rows, surrogate_rows
from ppcl.errors import UserError
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, PrunedHeads, TextRun, sort_key
from ppcl.storage.manifest import write_atomically

STREAMS = ("img", "txt")
# In `detection.json`, without and with every channel z-scored.
_TABLE_NAMES = {False: "cka", True: "cka_standardized"}


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


def streams_of(probes_folder: Path) -> tuple[str, ...]:
    """The teacher's streams: the image's alone where all blocks take text and image tokens as one."""
    there = load_file(tokens_file(probes_folder, 1))
    return tuple(name for name in STREAMS if name in there)


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


@dataclass(frozen=True)
class Task:
    """Some rows of one table, computed by `rows(spec, starts)`; independent of all others."""

    rows: Callable[[TableSpec, Sequence[int]], dict[int, list[Similarity | None]]]
    spec: TableSpec
    starts: tuple[int, ...]

    def __call__(self) -> dict[int, list[Similarity | None]]:
        return self.rows(self.spec, self.starts)


# Runs tasks, here or elsewhere, and gives their results in order.
RunTasks = Callable[[Sequence[Task]], Iterable[dict[int, list[Similarity | None]]]]


def run_here(tasks: Sequence[Task]) -> Iterator[dict[int, list[Similarity | None]]]:
    return (task() for task in tasks)


@dataclass(frozen=True)
class _TableRequest:
    rows: Callable[[TableSpec, Sequence[int]], dict[int, list[Similarity | None]]]
    stream: str
    standardize: bool = False


class _Tables:
    """The similarity tables that detection reads, computed as one list of tasks."""

    def __init__(self, folder: Path, blocks: int, tokens: Mapping[str, torch.Tensor], device: str):
        self.folder, self.blocks, self.tokens, self.device = folder, blocks, tokens, device

    def compute(
        self, requests: Sequence[_TableRequest], run: RunTasks, tell: Callable[[int, int], None]
    ) -> list[tuple[Table, Table]]:
        """By request, the values and their standard errors. `tell(done, total)` counts rows."""
        tasks, owners = [], []
        for number, request in enumerate(requests):
            spec = TableSpec(
                self.folder, self.blocks, request.stream, self.tokens[request.stream], request.standardize, self.device
            )
            for starts in _dealt(self.blocks):
                tasks.append(Task(request.rows, spec, starts))
                owners.append(number)
        tables = [(_empty(self.blocks), _empty(self.blocks)) for _ in requests]
        done, total = 0, len(requests) * self.blocks
        for owner, rows in zip(owners, run(tasks), strict=True):
            values, errors = tables[owner]
            for u, row in rows.items():
                values[u] = [None if cell is None else cell[0] for cell in row]
                errors[u] = [None if cell is None or isnan(cell[1]) else cell[1] for cell in row]
            done += len(rows)
            tell(done, total)
        return tables


def _dealt(blocks: int) -> list[tuple[int, ...]]:
    """Rows dealt out to tasks: a long one with a short one, so that tasks take the same time."""
    return [tuple(sorted({u, blocks - 1 - u})) for u in range((blocks + 1) // 2)]


def _empty(blocks: int) -> Table:
    return [[None] * blocks for _ in range(blocks)]


def _bounded(finite: torch.Tensor, most: int) -> torch.Tensor:
    """The numbers of at most so many finite tokens, spread evenly over all."""
    numbers = finite.nonzero().flatten()
    if len(numbers) <= most:
        return numbers
    return numbers[torch.linspace(0, len(numbers) - 1, most, dtype=torch.float64).round().long()]


def similarity_tables(
    probes_folder: Path,
    block_ranges: list[range],
    settings: Detection,
    width: Width,
    tell: Callable[[int, int], None],
    run: RunTasks = run_here,
    device: str = "cpu",
) -> dict[str, Any]:
    """The tables of both streams and their mean, Δ, and how well FFNs and text streams are linear maps.

    `cka`, and `cka_standardized` where it is asked for; `cka_error`: the standard error of the table that is used, from
    groups of tokens. `first_difference`: the intervals of Algorithm 1. `text_map`: see `stream_rows`. `ffn_errors`: by
    block, see `ppcl.detection.fit_probes.ffn_error`. `tokens`: those compared, `left_out`: those that were not finite,
    of each stream. `tell(done, total)` counts rows of tables, which `run` computes on `device`.
    """
    blocks, streams = block_ranges[-1].stop, streams_of(probes_folder)
    if settings.stream not in (*streams, "mean"):
        raise UserError("detection.stream is txt, but this teacher has one stream for text and image; set img")
    with_text = width.text and "txt" in streams
    finite = {name: finite_tokens(probes_folder, blocks, name) for name in streams}
    tokens = {name: _bounded(rows, settings.tokens) for name, rows in finite.items()}
    kinds = [False, True] if settings.compare_standardized else [settings.standardize]
    requests = [_TableRequest(surrogate_rows, name, kind) for kind in kinds for name in streams]
    if with_text:
        requests.append(_TableRequest(stream_rows, "txt"))
    computed = _Tables(probes_folder, blocks, tokens, device).compute(requests, run, tell)
    each = len(streams)
    tables = {kind: _with_mean(dict(zip(streams, computed[each * i :]))) for i, kind in enumerate(kinds)}
    used, standard_errors = tables[settings.standardize]
    delta = differences(used[settings.stream])
    errors = {block: ffn_error(probe_file(probes_folder, block)) for block in range(blocks)}
    return {
        "blocks": blocks,
        "spans": [[span.start, span.stop] for span in block_ranges],
        "stream": settings.stream,
        "standardize": settings.standardize,
        "method": settings.method,
        "left_out": {name: int((~rows).sum()) for name, rows in finite.items()},
        "tokens": {name: len(rows) for name, rows in tokens.items()},
        **{_TABLE_NAMES[kind]: values for kind, (values, _) in tables.items()},
        "cka_error": standard_errors,
        "delta": delta,
        "first_difference": [[i.first, i.last] for i in first_difference(delta, block_ranges) if i.removed],
        "text_map": computed[-1][0] if with_text else None,
        "ffn_errors": {block: error for block, error in errors.items() if error is not None},
    }


def intervals_from_similarity(tables: Mapping[str, Any], settings: Detection) -> list[Interval]:
    """The intervals of a method that measures no velocity."""
    block_ranges = [range(*span) for span in tables["spans"]]
    if settings.method == "first_difference":
        return [Interval(*ends) for ends in tables["first_difference"]]
    count = settings.removed or round(0.4 * tables["blocks"])
    if settings.method == "uniform":
        return evenly(count, block_ranges)
    return threshold(tables[_TABLE_NAMES[settings.standardize]][settings.stream], count, block_ranges)


def detection_record(
    tables: Mapping[str, Any],
    intervals: Sequence[Interval],
    layouts: Sequence[Sequence[Interval]],
    width: Width,
    probes_folder: Path,
    prunable: Sequence[int],
) -> dict[str, Any]:
    """What the stage leaves: the tables, `intervals` that may overlap, and `plan`, every replacement to be made.

    `layouts`: plans of intervals; text runs are found in what each of them leaves. `prunable`: the blocks of which
    hidden units and heads can go; linear maps are for those among them whose FFN stands alone.
    """
    block_ranges = [range(*span) for span in tables["spans"]]
    errors = tables["ffn_errors"]
    ffns = sorted(errors, key=errors.__getitem__)[: width.linear_ffns]
    runs: dict[TextRun, None] = {}
    if tables["text_map"] is not None:
        for layout in layouts:
            places = _apart(_with_text(probes_folder, block_ranges), [*layout, *_chains(intervals)])
            runs |= dict.fromkeys(text_runs(tables["text_map"], places, width.text_similarity))
    units, heads = (sorted(set(kept), reverse=True) for kept in (width.ffn_keep_percents, width.head_keep_percents))
    pruned = [
        *(PrunedFfn(block, kept) for block in prunable for kept in units),
        *(PrunedHeads(block, kept) for block in prunable for kept in heads),
    ]
    low_rank = [LowRankModulation()] if width.low_rank_modulations and prunable else []
    plan = [*intervals, *sorted(runs, key=sort_key), *map(LinearFfn, sorted(ffns)), *pruned, *low_rank]
    return {
        **tables,
        "intervals": [[interval.first, interval.last] for interval in intervals],
        "plan": [str(replacement) for replacement in plan],
    }


def _chains(intervals: Sequence[Interval]) -> list[Interval]:
    """The runs of blocks that overlapping intervals cover together."""
    chains: list[Interval] = []
    for interval in sorted(intervals, key=lambda interval: interval.first):
        if chains and interval.first <= chains[-1].last:
            chains[-1] = Interval(chains[-1].first, max(chains[-1].last, interval.last))
        else:
            chains.append(interval)
    return chains


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


def _with_mean(tables: Mapping[str, tuple[Table, Table]]) -> tuple[dict[str, Table], dict[str, Table]]:
    """The values and the standard errors by stream, and those of the mean of both."""
    values = {name: table for name, (table, _) in tables.items()}
    errors = {name: table for name, (_, table) in tables.items()}
    values["mean"] = [[_mean(cells) for cells in zip(*rows)] for rows in zip(*values.values())]
    errors["mean"] = [[_mean_error(cells) for cells in zip(*rows)] for rows in zip(*errors.values())]
    return values, errors


def _mean_error(cells: Iterable[float | None]) -> float | None:
    """Of the mean of the streams, whose tokens are not the same ones."""
    there = [x for x in cells if x is not None]
    return sum(x * x for x in there) ** 0.5 / len(there) if there else None


def _mean(cells: Iterable[float | None]) -> float | None:
    """Of the streams that are there: a last block may have no text."""
    there = [x for x in cells if x is not None]
    return sum(there) / len(there) if there else None


def write_detection(folder: Path, detection: dict[str, Any]) -> None:
    write_atomically(folder / "detection.json", json.dumps(detection))
