"""Algorithm 1 against tables worked by hand and block stacks whose redundant intervals are known."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ppcl.config import Detection
from ppcl.detection import detect, write_detection
from ppcl.intervals import differences, first_difference
from ppcl.probes.probe import Probe
from ppcl.probes.run import probe_file, tokens_file
from ppcl.probes.statistics import Statistics


def table(rows):
    """A whole table from the rows `cka(u, u), cka(u, u+1), …`."""
    blocks = len(rows)
    return [[None] * u + list(row) for u, row in enumerate(rows)] if blocks else []


def test_difference_is_the_similarity_a_block_costs():
    delta = differences(table([[1, 0.9, 0.7], [1, 0.95], [1]]))
    assert delta[0] == [None, pytest.approx(0.1), pytest.approx(0.2)]
    assert delta[1] == [None, None, pytest.approx(0.05)]
    assert delta[2] == [None, None, None]


def delta_of(rows):
    return [[None] * (u + 1) + list(row) for u, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "spans", "intervals"),
    [
        # Δ falls to block 2 and rises at 3: [0,2]; from 3 it never rises: [3,5].
        ([[0.5, 0.3, 0.4, 0, 0], [9, 9, 9, 9], [9, 9, 9], [0.3, 0.2], [9], []], [range(6)], [(0, 2), (3, 5)]),
        # A rise at once, at k = u + 2, ends every interval after two blocks; the last block is left alone.
        ([[0.1, 0.2, 0, 0], [9, 9, 9], [0.1, 0.2], [9], []], [range(5)], [(0, 1), (2, 3), (4, 4)]),
        # Δ that stays the same does not rise: "the first k with Δ(u, k) > Δ(u, k-1)".
        ([[0.2, 0.2, 0.2], [9, 9], [9], []], [range(4)], [(0, 3)]),
        # Two block lists: no interval crosses from one to the other.
        ([[0.5, 0.4, 0.3], [9, 9], [0.5], []], [range(2), range(2, 4)], [(0, 1), (2, 3)]),
        # No value behind block 2 (a stream the last block drops): the interval ends on what was measured.
        ([[0.5, 0.4, None], [9, None], [None], []], [range(4)], [(0, 2), (3, 3)]),
        ([[]], [range(1)], [(0, 0)]),
    ],
)
def test_algorithm_1(rows, spans, intervals):
    assert [tuple(i) for i in first_difference(delta_of(rows), spans)] == intervals


def write_stack(folder, blocks, tokens=400):
    """Fit probes to a stack of `x → block(x)` and leave what the probe stage leaves, the text stream the same."""
    generator = torch.Generator().manual_seed(0)
    fitted = torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    held_out = torch.randn(tokens, 24, generator=generator, dtype=torch.float64)

    def keep(boundary, x):
        save_file({s: x.float().contiguous().clone() for s in ("img", "txt")}, tokens_file(folder, boundary))

    keep(0, held_out)
    for number, block in enumerate(blocks):
        statistics = Statistics(24, 24)
        after = block(fitted)
        statistics.update(fitted, after - fitted)
        probe, _ = Probe.fit(statistics, 1e-9)
        save_file(
            {f"{s}.{n}": getattr(probe, n).clone() for s in ("img", "txt") for n in ("weight", "bias")},
            probe_file(folder, number),
        )
        fitted, held_out = after, block(held_out)
        keep(number + 1, held_out)


def linear(seed):
    w = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05
    return lambda x: x + x @ w


def hard(seed):
    """Nothing a linear map could stand in for."""
    w = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x: x + 2.0 * torch.cos(4 * x @ w)


def test_a_stack_with_a_known_redundant_run(tmp_path):
    """Blocks 1 to 4 are linear, 0 and 5 are not: a linear run costs nothing, so Δ rises at block 5 and not before."""
    write_stack(tmp_path, [hard(0), linear(1), linear(2), linear(3), linear(4), hard(5), linear(6), linear(7)])
    told = []
    found = detect(tmp_path, [range(8)], Detection(), lambda done, total: told.append((done, total)))
    plain = found["cka"]["img"]
    # From block 0 (kept) the linear run follows exactly; a probe of block 5 cannot.
    assert min(plain[0][1:5]) > 0.9999 and plain[0][5] < 0.9
    assert plain[5][7] > 0.9999
    # Rounding decides where "no cost" rises within a run of none; the block that costs is never inside one.
    for u, v in found["intervals"]:
        assert not u < 5 <= v, "block 5 was replaced by a probe"
    assert told[-1] == (16, 16) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_detection_is_read_from_the_streams_asked_for(tmp_path):
    """Costs that fall and then rise, the same in every row: [0,2], [3,5] whatever the estimator's noise."""
    strengths = [0.0, 1.2, 0.3, 1.2, 1.2, 0.3]

    def bent(strength, seed):
        w = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return lambda x: x + strength * torch.cos(4 * x @ w)

    write_stack(tmp_path, [bent(s, i) for i, s in enumerate(strengths)])
    for stream in ("img", "txt", "mean"):
        found = detect(tmp_path, [range(6)], Detection(stream=stream), lambda done, total: None)
        assert found["intervals"] == [[0, 2], [3, 5]]
        assert found["stream"] == stream
    write_detection(tmp_path / "detection", found)
    assert json.loads((tmp_path / "detection" / "detection.json").read_text()) == found
    table = found["cka"]["mean"]
    assert all(table[u][u] == 1 for u in range(6)) and all(table[u][k] is None for u in range(6) for k in range(u))
