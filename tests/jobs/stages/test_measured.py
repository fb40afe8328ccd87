"""Measured detection on a real Ray: intervals are measured, screened, chosen and distilled to the end."""

import json

import pytest
import torch

from jobs.stages import detection, distillation, probes, screening, selection
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.detection.surrogates import fit_surrogates
from ppcl.errors import UserError
from ppcl.models import adapter_of, embed, head, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, parse_replacement
from ppcl.replacements.io import load_replacement
from tests.jobs.stages.test_probes import calibration  # noqa: F401  (a fixture)
from tests.stage_context import context

CUSTOM = [1, 3]


def config(teacher_folder, **changes):
    return Config(
        teacher=teacher_folder,
        prompts=teacher_folder / "none.txt",
        device="cpu",
        probes={"batch_size": 5, "tokens_per_sample": 4},
        detection={"max_length": 3, "samples": 6, "resamples": 5, "fit_tokens": 64, "screening_steps": 3} | changes,
        width={"ffn_keep_percents": [50], "linear_ffns": 0},
        distillation={"steps": 4, "warmup": 1, "batch_size": 4},
        variants={"budgets": [0.9, 0.7], "custom": {"mine": [CUSTOM]}},
        evaluation={"batch_size": 4},
    )


@pytest.fixture(scope="module")
def made(ray_cluster, teacher_folder, calibration, tmp_path_factory):  # noqa: F811
    """The folders of all stages up to the students, and what each stage said."""
    settings, root = config(teacher_folder), tmp_path_factory.mktemp("job")
    folders, infos = {"calibration": calibration}, {}
    for module in (probes, detection, screening, selection, distillation):
        stage = module.STAGE
        folder = folders[stage.name] = root / stage.name
        folder.mkdir()
        given = context(settings, folder, **{name: folders[name] for name in stage.depends_on if name in folders})
        assert stage.enabled(settings)
        stage.check(given)
        infos[stage.name] = stage.run(given)
    return folders, infos


def read(folders, stage, name):
    return json.loads((folders[stage] / name).read_text())


def test_every_interval_is_measured_as_its_surrogate_in_the_teacher(made, teacher_folder):
    """Held against the surrogate's map between the teacher's own blocks, by hand."""
    folders, _ = made
    measured = read(folders, "detection", "detection.json")["measured"]
    assert len(measured["sensitivity"]) == 5 + 4 and measured["samples"] == 6
    teacher = Teacher(teacher_folder)
    model, samples = teacher.transformer(), CalibrationSet(folders["calibration"])
    inputs = samples.batch(samples.ids("validation"), "cpu", torch.float32)
    adapter, blocks = adapter_of(model), list(model.transformer_blocks)
    with torch.no_grad():
        target = model(**{**inputs, "return_dict": False})[0]
        for first, last in ((0, 1), (2, 4)):
            (surrogate,) = fit_surrogates(folders["probes"], first, [last], 1e-4, "cpu", torch.float32).values()
            streams, call = embed(model, inputs)
            streams = surrogate(run_blocks(adapter, blocks[: first + 1], streams, call))
            velocity = head(model, run_blocks(adapter, blocks[last + 1 :], streams, call), inputs)
            error = float((velocity - target).square().sum() / target.square().sum())
            assert measured["sensitivity"][f"{first}-{last}"] == pytest.approx(error, rel=1e-4)


def test_the_shortlist_holds_the_best_plans_and_what_the_user_asks_for(made):
    found = read(made[0], "detection", "detection.json")
    shortlist = {tuple(ends) for ends in found["intervals"]}
    assert tuple(CUSTOM) in shortlist and len(shortlist) <= 16 + 1
    assert set(found["measured"]["plans"]) == set(found["measured"]["recurrence"]) == {"1", "2"}
    best = min(found["measured"]["sensitivity"].items(), key=lambda one: one[1])[0]
    assert tuple(map(int, best.split("-"))) in shortlist
    assert found["first_difference"], "Algorithm 1's choice stays beside it"


def test_what_was_chosen_after_the_screening_is_trained_on_from_there(made, teacher_folder):
    folders, infos = made
    chosen = [parse_replacement(text) for text in read(folders, "selection", "selection.json")["plan"]]
    screened = {path.name for path in folders["screening"].glob("*.safetensors")}
    students = {path.name for path in folders["students"].glob("*.safetensors")}
    assert {f"{replacement.name}.safetensors" for replacement in chosen} == students <= screened
    assert Interval(*CUSTOM) in chosen
    assert "intervals are distilled to the end" in infos["selection"]["notes"][-1]
    for replacement in chosen:
        one, other = (folders[stage] / f"{replacement.name}.safetensors" for stage in ("screening", "students"))
        if isinstance(replacement, Interval):
            first, last = (load_replacement(path, Teacher(teacher_folder)).state_dict() for path in (one, other))
            moved = sum(float((first[name] - last[name]).square().sum()) for name in first) ** 0.5
            # Four steps with a rate of 1e-4: near where it was, and not the same.
            assert 0 < moved < 0.1 * sum(float(value.square().sum()) for value in first.values()) ** 0.5
        else:
            assert one.read_bytes() == other.read_bytes()


def test_stages_of_the_measurement_are_left_out_where_it_is_not_asked_for(teacher_folder):
    for changes in ({"method": "first_difference"}, {"screening_steps": 0}):
        assert not screening.STAGE.enabled(config(teacher_folder, **changes))
        assert not selection.STAGE.enabled(config(teacher_folder, **changes))


@pytest.mark.parametrize("method", ["first_difference", "cka_threshold", "uniform"])
def test_other_methods_remove_as_many_blocks_as_they_are_asked_for(made, teacher_folder, tmp_path, method):
    settings = config(teacher_folder, method=method, removed=2)
    info = detection.run(context(settings, tmp_path, probes=made[0]["probes"]))
    found = json.loads((tmp_path / "detection.json").read_text())
    own = [ends for ends in found["intervals"] if ends != CUSTOM or ends in found["first_difference"]]
    assert "measured" not in found and info["plan"] == found["plan"]
    if method == "first_difference":
        assert own == found["first_difference"]
    else:
        assert sum(last - first for first, last in own) == 2


def test_more_ranks_than_places_to_cut_are_refused_before_any_starts(made, teacher_folder, tmp_path):
    settings = config(teacher_folder)
    too_long = settings.distillation.model_copy(update={"pipeline_parallel": 6})
    settings = settings.model_copy(update={"distillation": too_long})
    with pytest.raises(UserError, match=r"pipeline is 6, but 6 blocks .* set distillation.pipeline_parallel to \d or"):
        screening.STAGE.check(context(settings, tmp_path, detection=made[0]["detection"]))


def test_intervals_that_no_list_of_blocks_has_are_refused(teacher_folder, tmp_path):
    with pytest.raises(UserError, match="detection.max_length is 7, and the longest list .* has 6; give 6 or less"):
        detection.check(context(config(teacher_folder, max_length=7), tmp_path))


def test_too_few_tokens_for_the_closed_forms_are_told(made, teacher_folder, tmp_path):
    settings, folders = config(teacher_folder, fit_tokens=4), made[0]
    few = tmp_path / "probes"
    few.mkdir()
    probes.run(context(settings, few, calibration=folders["calibration"]))
    (tmp_path / "detection").mkdir()
    info = detection.run(context(settings, tmp_path / "detection", calibration=folders["calibration"], probes=few))
    assert any("no more tokens to fit on than the streams have channels" in note for note in info["notes"])
