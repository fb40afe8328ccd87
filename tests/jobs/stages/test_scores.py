"""Scorers on Ray: every image is scored beside the teacher's; what is wrong with a scorer is told in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.stages import scores
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.evaluation.images import FIRST_SEED, image_path, save_images
from tests.stage_context import context

# Brightness by variant and image: the teacher's are lighter.
LIGHT = {"teacher": [200, 100, 150, 250, 50], "half": [100, 100, 150, 200, 50]}
PROMPTS = [
    {"text": "a", "category": "x", "suite": "prompts", "row": {}},
    {"text": "b", "category": "x", "suite": "prompts", "row": {}},
    {"text": "c", "category": "y", "suite": "prompts", "row": {}},
    {"text": "d", "category": None, "suite": "dpg", "row": {"id": "7", "questions": 3}},
    {"text": "e", "category": None, "suite": "dpg", "row": {"id": "8", "questions": 1}},
]

SCORER = """
import os
import numpy as np

def brightness(prompts, images, metadata, scale=1.0):
    assert images.dtype == np.uint8 and images.shape[1:] == (16, 16, 3) or os.environ.get("TRIED") != "no"
    return images.mean(axis=(1, 2, 3)) * scale

def darker_than_teacher(prompts, images, metadata):
    return [bool(image.mean() < row["teacher"].mean()) for image, row in zip(images, metadata)]

def told(prompts, images, metadata):
    return [row["seed"] + 1000 * row.get("questions", 0) for row in metadata]

def not_finite(prompts, images, metadata):
    return [float("nan")] * len(prompts)

class Environment:
    def __call__(self, prompts, images, metadata):
        return [float(os.environ["SCORER_NUMBER"])] * len(prompts)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, ray_cluster):
    """The folder of an evaluation, and one with the module `own_scorer`, which is on no worker's path."""
    evaluation, code = tmp_path_factory.mktemp("evaluation"), tmp_path_factory.mktemp("code")
    for variant, values in LIGHT.items():
        images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])
        save_images(images, [image_path(evaluation, variant, i) for i in range(len(values))])
    record = {"prompts": PROMPTS, "variants": {name: {} for name in LIGHT}}
    (evaluation / "evaluation.json").write_text(json.dumps(record))
    (code / "own_scorer.py").write_text(SCORER)
    return evaluation, code


def config(teacher_folder, code: Path, **scorers):
    environment = {"env_vars": {"PYTHONPATH": str(code), "SCORER_NUMBER": "3.5"}}
    given = {name: {"batch_size": 2, "runtime_env": environment} | one for name, one in scorers.items()}
    return Config(
        teacher=teacher_folder,
        prompts=code / "prompts.txt",
        device="cpu",
        evaluation={"scorers": given, "suites": {"dpg": code / "dpg.jsonl"}},
    )


def test_every_image_is_scored_by_every_scorer(folders, teacher_folder, tmp_path):
    evaluation, code = folders
    settings = config(
        teacher_folder,
        code,
        light={"call": "own_scorer:brightness", "arguments": {"scale": 2}, "workers": 2},
        darker={"call": "own_scorer:darker_than_teacher", "higher_is_better": False, "suites": ["prompts"]},
        told={"call": "own_scorer:told", "suites": ["dpg"]},
        env={"call": "own_scorer:Environment"},
    )
    seen = []

    def events(done, total=None, values=None, phase=None):
        seen.append((phase, done, total))

    info = scores.run(context(settings, tmp_path, events, evaluation=evaluation))
    record = json.loads((tmp_path / "scores.json").read_text())
    values = record["values"]
    assert values["light"] == {name: {str(i): 2.0 * v for i, v in enumerate(light)} for name, light in LIGHT.items()}
    assert list(values["darker"]["half"].values()) == [1, 0, 0]
    assert values["told"]["teacher"] == {str(i): FIRST_SEED + i + 1000 * PROMPTS[i]["row"]["questions"] for i in (3, 4)}
    assert set(values["env"]["half"].values()) == {3.5}
    rows = {(b["scorer"], b["suite"]): b["variants"] for b in record["benchmarks"]}
    assert set(rows) == {
        ("light", "prompts"),
        ("light", "dpg"),
        ("darker", "prompts"),
        ("told", "dpg"),
        ("env", "prompts"),
        ("env", "dpg"),
    }
    # Of the categories x and y alike: (200 + 100) / 2 and 150, times 2.
    assert rows["light", "prompts"]["teacher"]["score"] == 300 and rows["light", "prompts"]["half"]["score"] == 250
    assert rows["light", "prompts"]["half"]["R"] == pytest.approx(100 * 50 / 300)
    assert rows["light", "dpg"]["half"]["R"] == pytest.approx(100 * 50 / 300)
    assert rows["darker", "prompts"]["half"]["R"] is None
    assert record["mean_drop"]["half"]["benchmarks"] == 5
    assert info["scorers"]["light"]["arguments"] == {"scale": 2} and "workers" not in info["scorers"]["light"]
    assert ("scoring with light, batch", 6, 6) in seen and ("scoring with darker, batch", 0, 4) in seen


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"call": "own_scorer:not_finite"}, "evaluation.scorers.mine gave nan for the image of 'a prompt'"),
        ({"call": "own_scorer:nothing"}, "the module own_scorer has no nothing"),
        ({"call": "clip_score", "arguments": {"model": "/nowhere"}}, "the model folder /nowhere does not exist"),
        ({"call": "no_such_scorer_x:f", "runtime_env": None}, "the module no_such_scorer_x cannot be imported"),
    ],
)
def test_scorers_are_tried_on_noise_before_the_job(folders, teacher_folder, scorer, message):
    _, code = folders
    (code / "prompts.txt").write_text("a prompt\nanother\na third\n")
    (code / "dpg.jsonl").write_text('{"prompt": "d"}\n')
    said = []
    with pytest.raises(UserError, match=message):
        scores.try_scorers(config(teacher_folder, code, mine=scorer), said.append)
    assert said == ["scores: trying mine on 2 images of noise"]


def test_a_scorer_of_suites_without_images_is_refused(folders, teacher_folder, tmp_path):
    evaluation, code = folders
    record = json.loads((evaluation / "evaluation.json").read_text())
    only = tmp_path / "evaluation"
    only.mkdir()
    (only / "evaluation.json").write_text(json.dumps(record | {"prompts": PROMPTS[3:]}))
    settings = config(teacher_folder, code, mine={"call": "own_scorer:told", "suites": ["prompts"]})
    with pytest.raises(UserError, match=r"evaluation.scorers.mine.suites is \['prompts'\], and no image is of these"):
        scores.run(context(settings, tmp_path / "scores", evaluation=only))
