"""The table of similarities and its intervals, from stacks of blocks whose redundant runs are known."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.config.schema import Detection, Width
from ppcl.detection.cka import cka
from ppcl.detection.detect import write_detection
from ppcl.detection.fit_probes import probe_file, tokens_file
from ppcl.errors import UserError
from ppcl.linalg.affine_fit import Probe
from ppcl.linalg.moments import Moments
from tests.detecting import detect

WIDTH = 24


def found_in(folder, blocks, tell=lambda done, total: None, block_ranges=None, **settings):
    settings = {"method": "first_difference"} | settings
    return detect(folder, block_ranges or [range(blocks)], Detection(**settings), Width(), tell)


def write_stack(folder, blocks, tokens=400, without_text=()):
    """Fit probes to a stack of `x → block(x)` and leave what the probe stage leaves; both streams are the same."""
    generator = torch.Generator().manual_seed(0)
    fitted = torch.randn(4000, WIDTH, generator=generator, dtype=torch.float64)
    held_out = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)

    def keep(boundary, x):
        names = ("img",) if boundary in without_text else ("img", "txt")
        save_file({s: x.float().contiguous().clone() for s in names}, tokens_file(folder, boundary))

    keep(0, held_out)
    for number, block in enumerate(blocks):
        after = block(fitted)
        statistics = Moments(WIDTH, WIDTH)
        statistics.update(fitted, after - fitted)
        probe, _ = Probe.fit(statistics, 1e-9)
        names = ("img",) if number + 1 in without_text else ("img", "txt")
        save_file(
            {f"{s}.{n}": getattr(probe, n).clone() for s in names for n in ("weight", "bias")},
            probe_file(folder, number),
        )
        fitted, held_out = after, block(held_out)
        keep(number + 1, held_out)


def matrix(seed):
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed):
    """A block that an affine probe replaces exactly."""
    w = 0.05 * matrix(seed)
    return lambda x: x + x @ w


def bent(seed, strength):
    """A residual block no linear map can stand in for: the stronger, the more similarity a probe in its place costs."""
    w = matrix(seed)
    return lambda x: x + strength * torch.cos(4 * x @ w)


def test_a_run_of_linear_blocks_costs_nothing_and_ends_where_the_next_block_costs(tmp_path):
    """Blocks 1 to 4 are linear, 0 and 5 are not."""
    write_stack(tmp_path, [bent(0, 2.0), *(linear(i) for i in range(1, 5)), bent(5, 2.0), linear(6), linear(7)])
    told = []
    found = found_in(tmp_path, 8, lambda done, total: told.append((done, total)))
    table = found["cka"]["img"]
    assert min(table[0][1:5]) > 0.9999 and table[0][5] < 0.9 and table[5][7] > 0.9999
    assert all(table[u][k] < 0.9 for u in range(5) for k in range(5, 8)), "a probe of block 5 is in all of these"
    # Rounding decides where "no cost" rises within a run of none; the block that costs is never replaced.
    assert not any(u < 5 <= v for u, v in found["intervals"])
    # Rows of three tables: of both streams, and of the text stream against itself.
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (24, 24)


@pytest.mark.parametrize(
    ("strengths", "intervals"),
    [
        # What a block costs falls within an interval and rises behind it. A kept block, at the start, costs nothing.
        ((0.0, 1.2, 0.3, 1.2, 1.2, 0.3), [[0, 2], [3, 5]]),
        ((0.5, 0.2, 1.4, 0.7, 0.7, 1.5), [[0, 1], [2, 4]]),
        # Less and less: one interval, to the end.
        ((0.5, 1.6, 1.0, 0.6, 0.3), [[0, 4]]),
        # More and more: the least interval each time.
        ((0.3, 0.3, 0.8, 0.3, 0.9, 0.3), [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_stacks_whose_intervals_are_known(tmp_path, strengths, intervals):
    write_stack(tmp_path, [bent(seed, s) for seed, s in enumerate(strengths)])
    assert found_in(tmp_path, len(strengths))["intervals"] == intervals
    # Intervals stay within a block list.
    cut = intervals[0][1]
    split = found_in(tmp_path, len(strengths), block_ranges=[range(cut), range(cut, len(strengths))])
    assert all(v < cut or u >= cut for u, v in split["intervals"])


def test_the_intervals_are_those_of_the_stream_asked_for(tmp_path):
    """Image tokens of one stack, text tokens of another."""
    for name, strengths in (("img", (0.0, 1.2, 0.3, 1.2, 1.2, 0.3)), ("txt", (0.5, 0.2, 1.4, 0.7, 0.7, 1.5))):
        (tmp_path / name).mkdir()
        write_stack(tmp_path / name, [bent(seed, s) for seed, s in enumerate(strengths)])
    for path in (tmp_path / "img").iterdir():
        tensors = {
            name: tensor
            for stream in ("img", "txt")
            for name, tensor in load_file(tmp_path / stream / path.name).items()
            if name.startswith(stream)
        }
        save_file(tensors, tmp_path / path.name)
    image, text, mean = (found_in(tmp_path, 6, stream=stream) for stream in ("img", "txt", "mean"))
    assert image["intervals"] == [[0, 2], [3, 5]] and text["intervals"] == [[0, 1], [2, 4]]
    table = mean["cka"]
    assert table["mean"][1][4] == pytest.approx((table["img"][1][4] + table["txt"][1][4]) / 2, rel=1e-12)
    assert mean["delta"][1][4] == pytest.approx(table["mean"][1][3] - table["mean"][1][4], rel=1e-12)


def test_the_table_is_the_similarity_of_surrogate_and_teacher(tmp_path):
    """Eq. 3, one entry after the other: from the teacher's tokens behind `u`, the probes of `u+1..k`, then CKA."""
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(4)])
    found = found_in(tmp_path, 4, compare_standardized=True)
    tokens = [load_file(tokens_file(tmp_path, boundary))["img"] for boundary in range(5)]
    for u in range(4):
        surrogate = tokens[u + 1]
        for k in range(u, 4):
            if k > u:
                weights = load_file(probe_file(tmp_path, k))
                surrogate = surrogate + surrogate @ weights["img.weight"].T + weights["img.bias"]
            for name, standardize in (("cka", False), ("cka_standardized", True)):
                expected = cka(tokens[k + 1], surrogate, standardize=standardize)
                assert found[name]["img"][u][k] == pytest.approx(expected, abs=1e-5)
    for table in (found["cka"]["mean"], found["cka_standardized"]["mean"]):
        assert all(table[u][k] is None for u in range(4) for k in range(u))
    assert found["delta"][1][3] == pytest.approx(found["cka"]["mean"][1][2] - found["cka"]["mean"][1][3], abs=1e-12)


def test_a_stream_that_the_last_block_drops_has_no_value_there(tmp_path):
    write_stack(tmp_path, [bent(seed, 0.5) for seed in range(4)], without_text={4})
    found = found_in(tmp_path, 4, stream="txt")
    assert [row[3] for row in found["cka"]["txt"]] == [None] * 4
    assert [row[3] for row in found["cka"]["mean"]] == [row[3] for row in found["cka"]["img"]]
    assert all(v < 3 for _, v in found["intervals"])


def test_tokens_that_are_not_finite_behind_any_block_count_nowhere(tmp_path):
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(4)])
    path = tokens_file(tmp_path, 3)
    kept = load_file(path)
    kept["img"][[3, 77], 0] = torch.tensor([float("nan"), float("inf")])
    save_file(kept, path)
    found = found_in(tmp_path, 4)
    assert found["left_out"] == {"img": 2, "txt": 0}
    for boundary in range(5):
        tokens = load_file(tokens_file(tmp_path, boundary))
        rest = [row for row in range(400) if row not in (3, 77)]
        save_file({name: x[rest].contiguous() for name, x in tokens.items()}, tokens_file(tmp_path, boundary))
    assert found["cka"]["img"] == found_in(tmp_path, 4)["cka"]["img"]


def test_too_few_finite_tokens_are_refused(tmp_path):
    write_stack(tmp_path, [linear(seed) for seed in range(2)], tokens=20)
    kept = load_file(tokens_file(tmp_path, 2))
    kept["txt"][:17] = float("nan")
    save_file(kept, tokens_file(tmp_path, 2))
    with pytest.raises(UserError, match="only 3 of 20 held-out tokens of the txt stream are finite.* CKA needs 4"):
        found_in(tmp_path, 2)


@pytest.mark.parametrize("standardize", [False, True])
def test_one_table_is_computed_unless_both_are_asked_for(tmp_path, standardize):
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(3)])
    both = found_in(tmp_path, 3, standardize=standardize, compare_standardized=True)
    one = found_in(tmp_path, 3, standardize=standardize)
    used, other = ("cka_standardized", "cka") if standardize else ("cka", "cka_standardized")
    assert one[used] == both[used] and other not in one and one["intervals"] == both["intervals"]


def test_no_more_tokens_are_compared_than_asked_for_and_the_error_is_told(tmp_path):
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(3)])
    whole, some = found_in(tmp_path, 3), found_in(tmp_path, 3, tokens=100)
    assert whole["tokens"] == {"img": 400, "txt": 400} and some["tokens"] == {"img": 100, "txt": 100}
    value, exact, error = (f["img"][0][2] for f in (some["cka"], whole["cka"], some["cka_error"]))
    assert 0 < abs(value - exact) < 4 * error
    assert whole["cka_error"]["img"][0][0] == 0 and whole["cka_error"]["img"][2][0] is None


def test_fewer_tokens_than_channels_give_the_same_similarities(tmp_path):
    """Then kernels of tokens are compared, not their features."""
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(3)], tokens=WIDTH - 4)
    found = found_in(tmp_path, 3)
    tokens = [load_file(tokens_file(tmp_path, boundary))["img"] for boundary in range(4)]
    weights = load_file(probe_file(tmp_path, 1))
    surrogate = tokens[1] + tokens[1] @ weights["img.weight"].T + weights["img.bias"]
    assert found["cka"]["img"][0][1] == pytest.approx(cka(tokens[2], surrogate), abs=1e-5)


@pytest.fixture
def written(tmp_path):
    write_stack(tmp_path, [bent(seed, 0.8) for seed in range(3)], without_text={3})
    found = found_in(tmp_path, 3)
    write_detection(tmp_path / "detection", found)
    return tmp_path / "detection" / "detection.json", found


def test_what_was_found_is_read_back_as_it_was(written):
    path, found = written

    def no_constants(text):
        raise AssertionError(f"{text} is not JSON")

    assert json.loads(path.read_text(), parse_constant=no_constants) == found
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_what_was_there(written, monkeypatch):
    path, found = written
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"detection\.json could not be written \(No space left on device\); free space"
    ):
        write_detection(path.parent, {**found, "intervals": []})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
