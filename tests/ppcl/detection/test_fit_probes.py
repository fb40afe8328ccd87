"""A rank's whole work on a small Qwen-Image: the same probes whatever the ranks and batches, held against lstsq."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ppcl.config.schema import Detection, Probes, Width
from ppcl.detection.fit_probes import dropped, fit_probes, probe_file, tokens_file, underdetermined
from ppcl.errors import UserError
from ppcl.models import embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks
from tests.detecting import detect
from tests.ppcl.linalg.tokens import least_squares
from tests.samples import MemorySamples

# X_0 has the rank of its 16 latent channels, so block 0 needs the ridge.
SETTINGS = Probes(batch_size=5, tokens_per_sample=3, ridge=1e-6)
SAMPLES = 64
# More than all samples give.
TOKENS = 4096
BLOCKS = 6


class Poisoned(MemorySamples):
    """Samples of which these are NaN."""

    def __init__(self, count, bad):
        super().__init__(count)
        self.latents[bad] = float("nan")


def fitted(teacher_folder, folder, pp=1, batch_size=5, samples=None):
    settings = SETTINGS.model_copy(update={"batch_size": batch_size})
    captured = []
    fit_probes(
        Teacher(teacher_folder),
        samples or MemorySamples(SAMPLES),
        settings,
        RunContext(
            Path(folder),
            Path(folder),
            dims=ParallelDims.join(pp, 1),
            report=lambda done, total, values, phase=None: captured.append((done, total)),
        ),
        TOKENS,
    )
    assert [done for done, _ in captured] == sorted(done for done, _ in captured) and captured[-1] == (SAMPLES, SAMPLES)


def on_ranks(teacher_folder, folder, pp, batch_size):
    fitted(teacher_folder, folder, pp, batch_size)


@pytest.fixture(scope="module")
def alone(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fitted(teacher_folder, folder)
    return folder


@pytest.fixture(scope="module")
def streams(teacher_folder):
    """Of the stock model and all fitted samples at once: the streams at every boundary, and the text mask."""
    samples, teacher = MemorySamples(SAMPLES), Teacher(teacher_folder)
    model = teacher.transformer()
    inputs = samples.batch(samples.ids("train"))
    with torch.no_grad():
        start, context = embed(model, inputs)
        kept = [start]
        for block in teacher.adapter.blocks(model):
            kept.append(run_blocks(teacher.adapter, [block], kept[-1], context))
    return kept, inputs["encoder_hidden_states_mask"].bool()


@pytest.mark.parametrize("block", range(1, BLOCKS))
def test_every_probe_is_the_solvers(alone, streams, block):
    boundaries, mask = streams
    probe = load_file(probe_file(alone, block))
    for name in ("img", "txt"):
        x, y = (getattr(boundaries[b], name) for b in (block, block + 1))
        x, y = (t[mask] if name == "txt" else t.flatten(0, 1) for t in (x, y))
        weight, bias = least_squares(x.numpy(), (y - x).numpy(), SETTINGS.ridge)
        np.testing.assert_allclose(probe[f"{name}.weight"].numpy(), weight, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(probe[f"{name}.bias"].numpy(), bias, rtol=1e-4, atol=2e-6)


def assert_same_files(one, two, tolerance):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == BLOCKS + BLOCKS + 1
    for name in names:
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            wrong = (ours[key] - theirs[key]).abs().max()
            assert wrong <= tolerance, f"{name} {key}: {wrong:.1e}"


def test_two_ranks_write_what_one_does(teacher_folder, alone, tmp_path):
    ranks.run(2, on_ranks, teacher_folder, str(tmp_path), 2, 5)
    assert_same_files(alone, tmp_path, 1e-6)


def test_the_size_of_batches_does_not_matter(teacher_folder, alone, tmp_path):
    fitted(teacher_folder, tmp_path, batch_size=16)
    assert_same_files(alone, tmp_path, 5e-6)


def test_held_out_tokens_are_the_same_ones_at_every_boundary(alone, teacher_folder):
    samples, teacher = MemorySamples(SAMPLES), Teacher(teacher_folder)
    model = teacher.transformer()
    first = {name: x.clone() for name, x in load_file(tokens_file(alone, 0)).items()}
    assert first["img"].shape == first["txt"].shape == (16 * 3, 32)
    ids = samples.ids("validation")
    inputs = samples.batch(ids)
    mask = inputs["encoder_hidden_states_mask"].bool()
    with torch.no_grad():
        start, context = embed(model, inputs)
        end = run_blocks(teacher.adapter, teacher.adapter.blocks(model), start, context)
    last = load_file(tokens_file(alone, BLOCKS))
    for row in range(len(ids)):
        mine = slice(3 * row, 3 * row + 3)
        for name in ("img", "txt"):
            before, after = getattr(start, name)[row], getattr(end, name)[row]
            places = torch.cdist(first[name][mine], before).argmin(1)
            assert len(set(places.tolist())) == 3
            torch.testing.assert_close(first[name][mine], before[places], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(last[name][mine], after[places], rtol=1e-4, atol=1e-5)
            assert name == "img" or mask[row, places].all(), "padding was kept"


def test_the_table_of_a_whole_run(alone):
    found = detect(alone, [range(BLOCKS)], Detection(), Width(), lambda done, total: None)
    for stream in ("img", "txt", "mean"):
        table = found["cka"][stream]
        assert all(table[u][u] == 1 for u in range(BLOCKS))
        assert all(0 < table[u][k] < 1 for u in range(BLOCKS) for k in range(u + 1, BLOCKS))
    assert found["left_out"] == {"img": 0, "txt": 0} and found["intervals"]


def test_a_sample_of_nan_is_left_out_counted_and_changes_nothing_else(teacher_folder, alone, tmp_path):
    """One fitted sample, one held out: the probes are those of the others, and the table has a value everywhere."""
    samples = Poisoned(SAMPLES, bad=[7, 60])
    fitted(teacher_folder, tmp_path, samples=samples)
    tokens = {True: 16, False: int(samples.mask[7].sum())}
    with safe_open(probe_file(tmp_path, 4), "pt") as file:
        told = file.metadata()
    assert (told["img.dropped"], told["img.tokens"]) == (str(tokens[True]), str(47 * 16))
    # NaN reaches the text through attention in block 0.
    assert told["txt.dropped"] == str(tokens[False])
    assert dropped(probe_file(tmp_path, 4)) == 16 and dropped(probe_file(alone, 4)) == 0
    clean, ours = load_file(probe_file(alone, 4)), load_file(probe_file(tmp_path, 4))
    assert all(t.isfinite().all() for t in ours.values()) and not torch.equal(ours["img.weight"], clean["img.weight"])
    found = detect(tmp_path, [range(BLOCKS)], Detection(), Width(), lambda done, total: None)
    assert found["left_out"] == {"img": 3, "txt": 3}
    whole = detect(alone, [range(BLOCKS)], Detection(), Width(), lambda done, total: None)
    for u in range(BLOCKS):
        for k in range(u, BLOCKS):
            assert found["cka"]["mean"][u][k] == pytest.approx(whole["cka"]["mean"][u][k], abs=0.1)


def test_fits_to_no_more_tokens_than_the_width_are_known(teacher_folder, alone, tmp_path):
    """Three samples have 48 image tokens and at most 21 text tokens, and the width is between."""
    few = MemorySamples(4)
    fit_probes(
        Teacher(teacher_folder),
        few,
        SETTINGS,
        RunContext(tmp_path, tmp_path),
        TOKENS,
    )
    assert underdetermined(probe_file(tmp_path, 2)) == int(few.mask[:3].sum())
    assert underdetermined(probe_file(alone, 2)) is None


def test_samples_of_nothing_but_nan_are_refused_by_block_and_stream(teacher_folder, tmp_path):
    samples = Poisoned(SAMPLES, bad=list(range(SAMPLES)))
    with pytest.raises(UserError, match=r"block 0, img stream: there is no token to fit .*\(768 were left out"):
        fitted(teacher_folder, tmp_path, samples=samples)


def test_one_boundary_is_in_memory_at_a_time(teacher_folder, tmp_path, monkeypatch):
    """No activation is stored: while a block runs, only its own input is still there."""
    import gc
    import weakref

    from ppcl.detection import fit_probes as module

    alive, most = [], 0
    original = module.run_blocks

    def watched(adapter, blocks, streams, context, first):
        nonlocal most
        made = original(adapter, blocks, streams, context, first)
        alive.append(weakref.ref(made.img))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(module, "run_blocks", watched)
    fitted(teacher_folder, tmp_path, batch_size=64)
    assert len(alive) == 2 * BLOCKS and most <= 3


def test_no_more_tokens_are_kept_than_are_compared(teacher_folder, tmp_path):
    samples = MemorySamples(SAMPLES)
    count = len(samples.ids("validation"))
    fit_probes(Teacher(teacher_folder), samples, SETTINGS, RunContext(tmp_path, tmp_path), tokens=2 * count - 1)
    assert load_file(tokens_file(tmp_path, 1))["img"].shape[0] == 2 * count
