"""Surrogates of intervals, against numpy's least squares and against a teacher's own blocks."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ppcl.detection.fit_probes import fit_tokens_file
from ppcl.detection.surrogates import fit_surrogates
from ppcl.models import Streams
from ppcl.replacements import Interval

WIDTH = 12


@pytest.fixture
def tokens(tmp_path):
    """Streams of four boundaries, each an affine map of the one before and some noise; the last has no text."""
    generator = torch.Generator().manual_seed(0)
    x = {"img": torch.randn(300, WIDTH, generator=generator), "txt": torch.randn(200, WIDTH, generator=generator)}
    kept = [x]
    for _ in range(3):
        w = 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
        x = {n: v + v @ w + 1 + 0.1 * torch.randn(v.shape, generator=generator) for n, v in x.items()}
        kept.append(x)
    del kept[3]["txt"]
    for boundary, streams in enumerate(kept):
        save_file({n: v.contiguous() for n, v in streams.items()}, fit_tokens_file(tmp_path, boundary))
    return tmp_path, kept


def test_maps_are_the_least_squares_ones_whatever_else_is_fitted_with_them(tokens):
    folder, kept = tokens
    together = fit_surrogates(folder, 0, [1, 2], 0.0, "cpu", torch.float64)
    assert list(together) == [Interval(0, 1), Interval(0, 2)]
    for interval, surrogate in together.items():
        (alone,) = fit_surrogates(folder, 0, [interval.last], 0.0, "cpu", torch.float64).values()
        for stream in surrogate.maps:
            x, y = (kept[b][stream].double().numpy() for b in (1, interval.last + 1))
            design = np.hstack([x, np.ones((len(x), 1))])
            solution = np.linalg.lstsq(design, y - x, rcond=None)[0]
            assert surrogate.maps[stream].weight.numpy() == pytest.approx(solution[:-1].T, abs=1e-7)
            assert surrogate.maps[stream].bias.numpy() == pytest.approx(solution[-1], abs=1e-7)
            torch.testing.assert_close(surrogate.maps[stream].weight, alone.maps[stream].weight)
        assert not surrogate.underdetermined


def test_a_stream_that_ends_is_passed_on(tokens):
    folder, _ = tokens
    surrogate = fit_surrogates(folder, 0, [1, 2], 0.0, "cpu", torch.float32)[Interval(0, 2)]
    assert set(surrogate.maps) == {"img"}
    streams = Streams(torch.ones(2, 3, WIDTH), torch.ones(2, 5, WIDTH))
    assert surrogate(streams).txt is streams.txt and surrogate(streams).img.shape == (2, 3, WIDTH)


def test_too_few_tokens_leave_the_choice_to_the_ridge(tmp_path):
    for boundary in (1, 2):
        save_file({"img": torch.randn(WIDTH, WIDTH)}, fit_tokens_file(tmp_path, boundary))
    (surrogate,) = fit_surrogates(tmp_path, 0, [1], 1e-3, "cpu", torch.float32).values()
    assert surrogate.underdetermined and surrogate.maps["img"].weight.isfinite().all()
