"""Names and values of what is logged."""

from jobs.events import Event
from jobs.tracking.metrics import losses, metric_name, parameters, recorded_losses, stage_metrics
from ppcl.config.schema import Config
from ppcl.replacements import parse_replacement
from ppcl.storage.results import read_results
from tests.ppcl.report import made

NOW = "2026-01-01T00:00:00+00:00"


def test_names_are_made_of_what_every_tracker_takes():
    assert metric_name("students", "loss", "ffn:3/50") == "students/loss/ffn-3-50"
    assert metric_name("variants", "à b/../c", "R") == "variants/à-b-..-c/R"


def test_losses_that_are_no_numbers_and_progress_without_losses_are_left_out():
    event = Event("progress", NOW, "students", done=3, loss=float("nan"))
    assert losses(event, {"0-1": 0.5, "2-3": float("inf")}) == {"students/loss/0-1": 0.5}
    assert losses(Event("progress", NOW, "students", done=3), {}) == {}
    assert losses(Event("stage_done", NOW, "students", loss=1.0), {}) == {}


def test_quality_is_that_of_the_report_and_each_stage_has_its_own(tmp_path):
    results = read_results(made.job(tmp_path / "result"))
    sizes, quality = stage_metrics(results, "variants"), stage_metrics(results, "evaluation")
    assert sizes["variants/p90/share"] <= 0.9 and "variants/p90/R" not in sizes
    measured = results.stage("evaluation")["variants"]["p90"]
    assert quality["variants/p90/velocity_error"] == measured["velocity_error"]
    assert "variants/p90/share" not in quality and stage_metrics(results, "finetuning") == {}


def test_parameters_are_the_configuration_by_dotted_key_without_where_it_is_tracked():
    found = parameters(
        Config(teacher="t", prompts="p", tracking={"tensorboard": "tb"}, variants={"custom": {"a": ["1-2"]}})
    )
    assert found["distillation.steps"] == 6000 and found["variants.custom.a"] == '["1-2"]' and found["teacher"] == "t"
    assert not any(name.startswith("tracking") for name in found)


def test_losses_that_no_progress_told_are_those_of_the_stages_files_by_step_from_one(tmp_path):
    results = read_results(made.job(tmp_path / "result", ("students", "variants", "finetuning")))
    (name, first), *_ = results.stage("students")["replacements"].items()
    found = recorded_losses(results, "students", 0)
    steps = [point["step"] + 1 for point in first["curve"]]
    assert list(found) == steps and len(found[steps[0]]) == len(results.stage("students")["replacements"])
    key = f"students/loss/{parse_replacement(name).name}"
    assert [found[step][key] for step in steps] == [point["loss"] for point in first["curve"]]
    assert list(recorded_losses(results, "students", steps[3])) == steps[4:]
    assert recorded_losses(results, "finetuning", 0).popitem()[1].keys() == {"finetuning/loss/velocity"}
    assert recorded_losses(results, "variants", 0) == recorded_losses(results, "evaluation", 0) == {}
