"""Probes and detection on a real Ray: workers share the blocks out, and leave what one alone would."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from jobs.stages import detection, probes
from ppcl.calibration.dataset import CalibrationSet, write_call, write_embeddings, write_splits, write_states
from ppcl.calibration.trajectory_recorder import Call, State
from ppcl.config.schema import Config
from ppcl.detection.fit_probes import fit_probes
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.training.run_context import RunContext
from tests.samples import MemorySamples
from tests.stage_context import context

COUNT = 24


def config(teacher_folder, workers):
    settings = {"workers": workers, "batch_size": 5, "tokens_per_sample": 4}
    return Config(
        teacher=teacher_folder,
        prompts=teacher_folder / "none.txt",
        device="cpu",
        probes=settings,
        detection={"method": "first_difference"},
        worker_timeout_s=0.5,
    )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A calibration folder of random states, prompts of different lengths."""
    folder, samples = tmp_path_factory.mktemp("calibration"), MemorySamples(COUNT)
    texts = [samples.embeddings[i][samples.mask[i].bool()] for i in range(COUNT)]
    states = [State(i, i, i, float(samples.timesteps[i]), samples.latents[i]) for i in range(COUNT)]
    call = Call(each={"img_shapes": [[1, 4, 4]]}, whole={})
    write_embeddings(
        folder / "prompts" / "0.parquet",
        range(COUNT),
        [f"prompt {i}" for i in range(COUNT)],
        [{"encoder_hidden_states": text} for text in texts],
    )
    write_states(folder / "states" / "0.parquet", states, call, dropped=0)
    write_call(folder, "QwenImageTransformer2DModel", call)
    write_splits(folder, range(18, COUNT), [])
    return folder


@pytest.fixture(scope="module")
def alone(teacher_folder, calibration, tmp_path_factory):
    """What one rank leaves, here, without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    settings = config(teacher_folder, 1)
    fit_probes(
        Teacher(teacher_folder),
        CalibrationSet(calibration),
        settings.probes,
        RunContext(folder, folder, settings.seed),
        settings.detection.tokens,
    )
    return folder


def test_two_workers_leave_the_probes_of_one(ray_cluster, teacher_folder, calibration, alone, tmp_path):
    captured, together, found = [], tmp_path / "probes", []
    together.mkdir()
    two = config(teacher_folder, 2)
    info = probes.run(
        context(two, together, lambda *progress, phase=None: captured.append(progress), calibration=calibration)
    )
    assert info == {"blocks": 6, "dropped": 0, "notes": []}
    assert captured[-1][:2] == (COUNT, COUNT) and [told[0] for told in captured] == sorted(told[0] for told in captured)
    names = sorted(os.listdir(together))
    assert names == sorted(os.listdir(alone)) and len(names) == 6 + 7, "and nothing of Ray's is left there"
    for name in names:
        ours, theirs = load_file(together / name), load_file(alone / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert (ours[key] - theirs[key]).abs().max() <= 1e-6, f"{name} {key}"
    for folder in (together, alone):
        info = detection.run(context(two, tmp_path / "detection", probes=folder))
        found.append(json.loads((tmp_path / "detection" / "detection.json").read_text()))
        assert info == {"plan": found[-1]["plan"], "notes": []}
    assert found[0]["intervals"] == found[1]["intervals"] != []
    tables = [torch.tensor([[v or 0.0 for v in row] for row in f["cka"]["mean"]]) for f in found]
    torch.testing.assert_close(*tables, rtol=0, atol=1e-5)


def test_a_refusal_of_a_worker_arrives_as_one_sentence(ray_cluster, teacher_folder, calibration, tmp_path):
    """Latents that are NaN in every sample: no token to fit to."""
    broken = tmp_path / "calibration"
    for name in ("prompts", "call.json", "splits.json"):
        (broken / name).parent.mkdir(exist_ok=True)
        os.symlink(calibration / name, broken / name)
    samples = MemorySamples(COUNT)
    nan = torch.full_like(samples.latents[0], float("nan"))
    write_states(
        broken / "states" / "0.parquet",
        [State(i, i, i, 0.5, nan) for i in range(COUNT)],
        Call(each={"img_shapes": [[1, 4, 4]]}, whole={}),
        dropped=0,
    )
    folder = tmp_path / "probes"
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        probes.run(context(config(teacher_folder, 1), folder, calibration=broken))
    assert str(caught.value).startswith(
        "block 0, img stream: there is no token to fit an affine map to (288 were left out"
    )
    assert os.listdir(folder) == []


def test_more_workers_than_the_cluster_has_are_refused_before_any_starts(
    ray_cluster, teacher_folder, calibration, tmp_path
):
    with pytest.raises(
        UserError, match="probes.workers asks for 40 workers, but the cluster has 4 CPUs, of which 3 can"
    ):
        probes.run(context(config(teacher_folder, 40), tmp_path, calibration=calibration))
    assert os.listdir(tmp_path) == []
