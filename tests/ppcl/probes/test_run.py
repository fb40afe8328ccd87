"""A rank's whole work on a real small Qwen-Image: the same probes with one rank and with two, held against lstsq."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ppcl.architecture import embed, run_blocks
from ppcl.config import Probes
from ppcl.distillation.mesh import Mesh
from ppcl.probes.run import fit, probe_file, tokens_file
from ppcl.teacher import Teacher
from tests import ranks
from tests.samples import MemorySamples

SETTINGS = Probes(batch_size=5, tokens_per_sample=3, ridge=1e-9)  # X_0 has the rank of 16 latent channels


def _fit(teacher_folder, folder, pp, batch_size):
    settings = SETTINGS.model_copy(update={"batch_size": batch_size})
    fit(
        Teacher(teacher_folder), MemorySamples(64), settings, Mesh.join(pp, 1), Path(folder), seed=0, device="cpu",
        dtype=torch.float32, report=lambda done, total, values: None,
    )  # fmt: skip


def test_one_rank_two_ranks_and_a_solver_agree(teacher_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    ranks.run(1, _fit, teacher_folder, str(one), 1, 5)
    ranks.run(2, _fit, teacher_folder, str(two), 2, 16)
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir()) and len(names) == 6 + 7
    for name in names:
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)

    # Independently: the streams before and after block 3 of the stock model, and numpy's solver.
    samples, model = MemorySamples(64), Teacher(teacher_folder).transformer()
    inputs = samples.batch(samples.ids(held_out=False))
    with torch.no_grad():
        streams, context = embed(model, inputs)
        before = run_blocks(Teacher(teacher_folder).architecture, model.transformer_blocks[:3], streams, context)
        after = run_blocks(Teacher(teacher_folder).architecture, model.transformer_blocks[3:4], before, context)
    mask = inputs["encoder_hidden_states_mask"].bool()
    probe = load_file(probe_file(one, 3))
    for name in ("img", "txt"):
        x, y = (getattr(s, name)[mask] if name == "txt" else getattr(s, name).flatten(0, 1) for s in (before, after))
        x, y = x.double().numpy(), y.double().numpy()
        solution = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y - x, rcond=None)[0]
        np.testing.assert_allclose(probe[f"{name}.weight"].numpy(), solution[:-1].T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(probe[f"{name}.bias"].numpy(), solution[-1], rtol=1e-3, atol=1e-4)

    kept = load_file(tokens_file(one, 0))
    assert kept["img"].shape == (16 * 3, 32) and kept["txt"].shape == (16 * 3, 32)
