"""The calibration stage on a real Ray, with the tiny teacher."""

import json
import os
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.stage import prompts_hash
from jobs.stages import calibration
from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.splits import SPLIT_NAMES
from ppcl.config.schema import Config
from ppcl.errors import UserError
from tests import tiny
from tests.one_process import calibrate_in_this_process
from tests.stage_context import context

PROMPTS = [
    f"a photo of {n} {colour} circle"
    for n in ("one", "two large", "three")
    for colour in ("red", "blue", "green", "grey")
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def config(teacher_folder, prompts, arguments=None, **calibration):
    return Config(
        teacher=teacher_folder,
        prompts=prompts,
        device="cpu",
        sampling={"steps": 4, "height": 32, "width": 32, "arguments": arguments or {}},
        calibration={"states_per_prompt": 2, "validation": 0.25, "batch_size": 5} | calibration,
    )


def counts(prompts, train, validation, test, samples, dropped=0):
    """What the stage says of what it made."""
    of_splits = {"train_prompts": train, "validation_prompts": validation, "test_prompts": test}
    return {"prompts": prompts, **of_splits, "samples": samples, "dropped": dropped, "notes": []}


def run(made, folder, progress=lambda done, total: None):
    # As a job does before every attempt.
    shutil.rmtree(folder / "calibration", ignore_errors=True)
    given = context(made, folder / "calibration", progress)
    return calibration.run(replace(given, identity=replace(given.identity, prompts=prompts_hash(made))))


@pytest.fixture
def here(ray_cluster, monkeypatch):
    """The actors run in this process, one batch after the other: for what does not need Ray."""
    calibrate_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def reference(ray_cluster, teacher_folder, prompts, tmp_path_factory):
    """A calibration set made in this process: its folder, what the stage said of it, and of its progress."""
    folder = tmp_path_factory.mktemp("reference")
    captured = []
    with pytest.MonkeyPatch.context() as patch:
        calibrate_in_this_process(patch)
        info = run(config(teacher_folder, prompts), folder, lambda done, total: captured.append((done, total)))
    return folder, info, captured


def test_twelve_prompts_become_a_calibration_set(reference):
    folder, info, captured = reference
    assert info == counts(12, train=7, validation=3, test=2, samples=24)
    samples = CalibrationSet(folder / "calibration")
    assert [len(samples.ids(split)) for split in SPLIT_NAMES] == [14, 6, 4]
    prompts = [prompt for split in SPLIT_NAMES for prompt in samples.prompts(split)]
    assert len(prompts) == 12 and dict(prompts) == dict(enumerate(PROMPTS))
    seen = {text for _, text in samples.prompts("train") + samples.prompts("validation")}
    assert samples.seen_prompts() == seen and seen.isdisjoint(text for _, text in samples.prompts("test"))
    assert captured[-1] == (24, 24) and [d for d, _ in captured] == sorted(d for d, _ in captured)


def test_two_workers_on_ray_make_what_one_makes_here_whatever_the_batches(reference, teacher_folder, prompts, tmp_path):
    captured, two = [], config(teacher_folder, prompts, batch_size=2, workers=2)
    info = run(two, tmp_path, lambda done, total: captured.append((done, total)))
    assert info == reference[1]
    assert captured[-1] == (24, 24) and [d for d, _ in captured] == sorted(d for d, _ in captured)
    first, second = CalibrationSet(reference[0] / "calibration"), CalibrationSet(tmp_path / "calibration")
    for split in SPLIT_NAMES:
        assert first.ids(split).tolist() == second.ids(split).tolist()
        a, b = first.batch(first.ids(split)), second.batch(second.ids(split))
        assert a.keys() == b.keys()
        for name in ("hidden_states", "timestep", "encoder_hidden_states"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_other_trajectories_take_the_embeddings_that_are_there(reference, here, teacher_folder, prompts):
    folder = reference[0]
    (cache,) = (folder / "cache").glob("embeddings-*")
    times = {path.name: path.stat().st_mtime_ns for path in cache.glob("0*.parquet")}
    info = run(config(teacher_folder, prompts, states_per_prompt=1), folder)
    assert info["samples"] == 12
    assert list((folder / "cache").glob("embeddings-*")) == [cache]
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("0*.parquet")} == times


def test_a_stopped_run_goes_on_and_a_changed_file_is_made_again(here, teacher_folder, prompts, tmp_path):
    made = config(teacher_folder, prompts)
    run(made, tmp_path)
    before = CalibrationSet(tmp_path / "calibration")
    rows = before.batch(before.ids("train"))
    (states,) = (tmp_path / "cache").glob("states-*")
    (states / "00000001.parquet").unlink()
    kept = (states / "00000000.parquet").stat().st_mtime_ns
    with open(tmp_path / "calibration" / "prompts" / "00000002.parquet", "r+b") as file:
        file.write(b"damage")
    run(made, tmp_path)
    after = CalibrationSet(tmp_path / "calibration")
    again = after.batch(after.ids("train"))
    assert (states / "00000000.parquet").stat().st_mtime_ns == kept
    for name in ("hidden_states", "timestep", "encoder_hidden_states"):
        assert torch.equal(rows[name], again[name])


def test_guided_sampling_keeps_both_sides(here, teacher_folder, prompts, tmp_path):
    guided = config(teacher_folder, prompts, {"true_cfg_scale": 3.0, "negative_prompt": " "}, max_prompts=4)
    info = run(guided, tmp_path)
    assert info == counts(4, train=2, validation=1, test=1, samples=16)
    samples = CalibrationSet(tmp_path / "calibration")
    ids = samples.ids("train")
    conditional, not_conditional = samples.batch(ids[ids % 2 == 0]), samples.batch(ids[ids % 2 == 1])
    assert torch.equal(conditional["hidden_states"], not_conditional["hidden_states"])
    texts = not_conditional["encoder_hidden_states"]
    assert torch.equal(texts, texts[:1].expand_as(texts))
    assert sorted(i for split in SPLIT_NAMES for i, _ in samples.prompts(split)) == [0, 1, 2, 3]


def test_pictures_are_a_source_too(here, teacher_folder, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (40, 32), (60 * i, 100, 200)).save(tmp_path / f"{i}.png")
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps({"prompt": PROMPTS[i], "image": f"{i}.png"}) + "\n" for i in range(3)))
    info = run(config(teacher_folder, path, source="images"), tmp_path)
    assert info == counts(3, train=1, validation=1, test=1, samples=6)
    assert CalibrationSet(tmp_path / "calibration").batch([0])["hidden_states"].shape == (1, 16, 16)


def test_states_that_are_not_finite_are_refused(here, prompts, tmp_path):
    broken = tiny.qwen_pipeline(tmp_path / "broken")
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    # Only a trajectory's first state is noise alone, and so still finite.
    info = run(config(broken, prompts, states_per_prompt=4), tmp_path / "job")
    assert info == counts(12, train=7, validation=3, test=2, samples=12, dropped=36)
    rows = pq.read_table(tmp_path / "job" / "calibration" / "states").to_pydict()
    assert set(rows["timestep"]) == {1.0}


def test_a_mistake_found_by_a_worker_arrives_as_one_sentence(ray_cluster, teacher_folder, prompts, tmp_path):
    with pytest.raises(UserError) as caught:
        run(config(teacher_folder, prompts, {"true_cfg": 3.0}), tmp_path)
    assert str(caught.value).startswith(
        "sampling.arguments has 'true_cfg', which cannot be set for QwenImagePipeline; it takes"
    )
    assert "\n" not in str(caught.value)


def test_two_prompts_are_too_few(here, teacher_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue circle\na red circle\n")
    with pytest.raises(UserError, match="only 2 different prompts; at least 3 are needed, one to train"):
        run(config(teacher_folder, path), tmp_path)
    assert os.listdir(tmp_path) == ["prompts.txt"]
