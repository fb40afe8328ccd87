"""The table `cka(u, k)` of a teacher, row by row, from files of probes and held-out tokens.

A row needs no other, so rows are independent tasks. Cost of a table at `n` tokens, width `d` and `M` blocks:
`M²/2 · (n d² + n · min(n, d) · d)` multiplications, in float32 products of matrices where `n ≤ d`. Memory of a task:
`n · d` numbers a row, and `n · min(n, d)` a representation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ppcl.detection.cka import Representation, similarity
from ppcl.detection.fit_probes import probe_file, tokens_file
from ppcl.linalg.affine_fit import Probe

# CKA and its standard error.
Similarity = tuple[float, float]


@dataclass(frozen=True)
class TableSpec:
    """One table: of which stream and tokens, and how.

    `tokens`: numbers of the held-out tokens that count, the same ones behind every block. `standardize`: z-score every
    channel. `device`: where the products are computed.
    """

    folder: Path
    blocks: int
    stream: str
    tokens: torch.Tensor
    standardize: bool
    device: str

    def teacher_tokens(self, boundary: int) -> torch.Tensor | None:
        """`(n, d)` of the teacher at a boundary; None where the stream is gone."""
        tokens = load_file(tokens_file(self.folder, boundary)).get(self.stream)
        return None if tokens is None else tokens[self.tokens].to(self.device)

    def probe(self, block: int) -> Probe:
        weights = load_file(probe_file(self.folder, block), device=self.device)
        return Probe(weights[f"{self.stream}.weight"], weights[f"{self.stream}.bias"])

    def representation(self, tokens: torch.Tensor) -> Representation:
        return Representation.of(tokens, self.standardize)


def surrogate_rows(spec: TableSpec, starts: Sequence[int]) -> dict[int, list[Similarity | None]]:
    """By `u` of `starts`, the row `cka(u, ·)`; None for `k < u` and where the stream is gone.

    The surrogate starts from the teacher's own tokens after block `u` and goes through the probes of `u+1..k` (Eq. 3).
    """
    rows: dict[int, list[Similarity | None]] = {u: [None] * spec.blocks for u in starts}
    surrogates: dict[int, torch.Tensor] = {}
    for k in range(min(starts), spec.blocks):
        tokens = spec.teacher_tokens(k + 1)
        if tokens is None:
            break
        probe = spec.probe(k)
        surrogates = {u: probe(x) for u, x in surrogates.items()}
        teacher = spec.representation(tokens) if surrogates else None
        for u, x in surrogates.items():
            assert teacher is not None
            rows[u][k] = similarity(teacher, spec.representation(x))
        if k in rows:
            surrogates[k] = tokens
            rows[k][k] = (1.0, 0.0)
    return rows


def stream_rows(spec: TableSpec, starts: Sequence[int]) -> dict[int, list[Similarity | None]]:
    """By `r` of `starts`, CKA between the stream behind block `r` and behind block `s`, both the teacher's own."""
    rows: dict[int, list[Similarity | None]] = {r: [None] * spec.blocks for r in starts}
    behind: dict[int, Representation] = {}
    for s in range(min(starts), spec.blocks):
        tokens = spec.teacher_tokens(s + 1)
        if tokens is None:
            break
        here = spec.representation(tokens)
        for r, there in behind.items():
            rows[r][s] = similarity(there, here)
        if s in rows:
            behind[s] = here
            rows[s][s] = (1.0, 0.0)
    return rows
