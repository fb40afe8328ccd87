"""Whole jobs in which a process is killed, stopped or spoilt: what comes out is what an undisturbed job leaves.

`make faults` runs them; each has a real Ray with processes of its own.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open

from tests.faults.jobs import Job, before, checkpoints, same, steps, students, trained_no_more_than_needed

pytestmark = pytest.mark.faults

# What is told of a process that was stopped, where the patience is 20 s.
SILENT = r"\(process \d+ on [\d.]+\) sent no heartbeat for 20 s, the configuration's worker_timeout_s"


@pytest.mark.parametrize("fault", ["raises", "first killed", "last killed between", "last killed", "checkpoint"])
def test_students_outlive_the_loss_of_a_rank(values, result, undisturbed, tmp_path, fault):
    job = Job(values, result, fault, tmp_path / "mark").until("variants: ")
    assert (tmp_path / "mark").exists() and job.said.count("students: failed (") == 1
    same(students(job.output), undisturbed)
    assert "was damaged" not in job.said and not list(job.output.rglob("*.partial"))
    finished = trained_no_more_than_needed(job.tally, at_any_moment=fault == "checkpoint")
    # The first rank had done all of its steps when the last one died in its last.
    assert bool(finished) == (fault == "last killed")


def test_sums_of_a_rank_that_dies_are_those_of_one_that_does_not_to_the_bit(values, whole, tmp_path):
    job = Job(values, before(whole, "probes", tmp_path), "probe", tmp_path / "mark").until("detection: ")
    assert (tmp_path / "mark").exists() and job.said.count("probes: failed (") == 1
    same_probes(job.output, whole)


def same_probes(output, whole):
    """To the bit, tokens counted and errors too. (The files differ: safetensors writes their words in any order.)"""
    names = [path.name for path in (whole / "probes").glob("*.safetensors")]
    assert sorted(path.name for path in (output / "probes").glob("*.safetensors")) == sorted(names) != []
    for name in names:
        with safe_open(output / "probes" / name, "pt") as made, safe_open(whole / "probes" / name, "pt") as expected:
            assert made.metadata() == expected.metadata()
            assert all(torch.equal(made.get_tensor(key), expected.get_tensor(key)) for key in expected.keys())  # noqa: SIM118


def test_a_job_outlives_the_loss_of_an_evaluator(values, whole, tmp_path):
    job = Job(values, before(whole, "evaluation", tmp_path), "evaluation", tmp_path / "mark").end()
    assert (tmp_path / "mark").exists() and "evaluation: failed (" in job.said
    same_errors(job.output, whole)


def same_files(output, whole, stage):
    made, expected = (
        json.loads((folder / "manifest.json").read_text())["stages"][stage]["files"] for folder in (output, whole)
    )
    assert made == expected


def same_errors(output, whole):
    made, expected = (
        json.loads((folder / "evaluation" / "evaluation.json").read_text())["variants"] for folder in (output, whole)
    )
    assert made.keys() == expected.keys()
    for name, row in made.items():
        assert row["velocity_error"] == pytest.approx(expected[name]["velocity_error"], abs=1e-8)


def test_a_rank_that_stops_answering_is_given_up_after_the_patience_that_is_set(values, result, undisturbed, tmp_path):
    job = Job(values, result, "stopped", tmp_path / "mark", worker_timeout_s=20).until("variants: ")
    assert (
        "students: failed (rank 0 sent no heartbeat for 20 s, the configuration's worker_timeout_s); trying again"
        in job.said
    )
    same(students(job.output), undisturbed)
    trained_no_more_than_needed(job.tally)


def test_an_evaluator_that_stops_answering_is_given_up_after_the_patience_that_is_set(values, whole, tmp_path):
    job = Job(
        values, before(whole, "evaluation", tmp_path), "evaluation stopped", tmp_path / "mark", worker_timeout_s=20
    ).end()
    assert re.search(rf"evaluation: failed \(an evaluator {SILENT}\); trying again", job.said)
    same_errors(job.output, whole)


def test_a_worker_of_calibration_that_stops_answering_is_given_up_after_the_patience_that_is_set(
    values, whole, tmp_path
):
    output = before(whole, "calibration", tmp_path)
    shutil.rmtree(output / "cache")
    job = Job(values, output, "calibration stopped", tmp_path / "mark", worker_timeout_s=20).until("probes: ")
    assert re.search(rf"calibration: failed \(a worker of calibration {SILENT}\); trying again", job.said)
    same_files(output, whole, "calibration")


@pytest.mark.parametrize(("pipeline", "replicas"), [(2, 1), (1, 1), (1, 2)])
def test_a_killed_driver_leaves_what_any_number_of_workers_goes_on_from(
    values, result, undisturbed, pipeline, replicas
):
    job = Job(values, result)
    job.wait_until(lambda: len(checkpoints(job.output)) > 3)
    job.kill()
    started_over = []
    if (pipeline, replicas) == (2, 1):
        # One that was cut short, too, and one of which a single bit is another.
        cut, changed = checkpoints(job.output)[:2]
        cut.write_bytes(cut.read_bytes()[:-100])
        content = bytearray(changed.read_bytes())
        content[-1000] ^= 1
        changed.write_bytes(content)
        started_over = sorted([cut.stem, changed.stem])
    job = Job(values, result, distillation__pipeline=pipeline, distillation__replicas=replicas).until("variants: ")
    assert "probes: complete, skipped" in job.said
    same(students(job.output), undisturbed)
    trained_no_more_than_needed(job.tally, started_over, at_any_moment=True)
    told = [f"students: the checkpoint of {name} was damaged; trained again from the start" for name in started_over]
    assert [line for line in job.said.splitlines() if "was damaged" in line] == told
    assert all(0 in steps(job.tally)[name][1] for name in started_over)


def test_a_batch_that_is_not_finite_is_left_out_and_told(values, result, tmp_path):
    job = Job(values, result, "nan", tmp_path / "mark").until("variants: ")
    assert "steps were left out, since a batch or a gradient had NaN or infinite values" in job.said
    assert all(t.isfinite().all() for tensors in students(job.output).values() for t in tensors.values())
    assert json.loads((job.output / "manifest.json").read_text())["stages"]["students"]["info"]["skipped_steps"] > 0


def test_a_second_job_on_the_same_output_is_refused_and_the_first_goes_on(values, result, undisturbed):
    first = Job(values, result)
    first.wait_until(lambda: "students: " in first.said)
    second = Job(values, result).end(2)
    assert f"another ppcl job is writing to {result}" in second.said
    same(students(first.until("variants: ").output), undisturbed)
