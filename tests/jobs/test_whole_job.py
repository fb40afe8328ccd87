"""`ppcl compress` as a user runs it: stopped and continued, damaged, out of space; and what is done with its result.

What is stopped by a signal runs as a process of its own with its embedded Ray, everything else here, on the Ray of the
session.
"""

import json
import signal
import socket
import subprocess
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.runtime.evaluator_pool import _Evaluator
from tests.commands import as_process, stopped_cleanly
from tests.commands import in_process as ppcl
from tests.one_process import stages_in_this_process

STAGES = ["calibration", "probes", "detection", "students", "variants", "finetuning", "evaluation"]


@pytest.fixture(scope="module")
def job(tmp_path_factory, teacher_folder):
    """A configuration of a small, whole job; the result goes to `result` beside it."""
    folder = tmp_path_factory.mktemp("job")
    colours, shapes = ("red", "green", "blue", "black"), ("circle", "square", "triangle")
    (folder / "prompts.txt").write_text("\n".join(f"a photo of a {c} {s}" for c in colours for s in shapes))
    values = {
        "teacher": str(teacher_folder),
        "prompts": "prompts.txt",
        "output": str(folder / "result"),
        "device": "cpu",
        "sampling": {"steps": 3, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "validation": 0.3},
        "probes": {"workers": 2},
        "width": {"head_keep_percents": [50]},
        "detection": {"samples": 4, "resamples": 2, "screening_steps": 0},
        "distillation": {"steps": 30, "batch_size": 4, "warmup": 2, "pipeline_parallel": 2, "checkpoint_every": 5},
        "finetuning": {"steps": 20, "batch_size": 4, "warmup": 2, "measured_plans": 5, "checkpoint_every": 5},
        "variants": {"budgets": [0.9], "custom": {}},
        "evaluation": {"max_prompts": 3},
        "tracking": {"tensorboard": str(folder / "tensorboard")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def entries(job):
    return json.loads((job.parent / "result" / "manifest.json").read_text())["stages"]


def run_up_to(stage, job, *here):
    """Run the job in this process and interrupt it where the workers of a stage would start.

    `here`: stages whose work is done in this process, too, by one worker.
    """
    module = {"students": "distillation"}.get(stage, stage)
    with pytest.MonkeyPatch.context() as patch, stages_in_this_process(*here):
        patch.setattr(f"jobs.stages.{module}.run_worker_group", Mock(side_effect=KeyboardInterrupt))
        code, said, error = ppcl("compress", job, "--set", "probes.workers=1")
    assert code == 130, said + error


def stop(job, stage, number):
    """Run the job as a process of its own and stop it by a signal in a stage."""
    stopped_cleanly(job, stage, number)
    assert list(entries(job)) == STAGES[: STAGES.index(stage)]


@pytest.fixture(scope="module")
def finished(job, ray_cluster):
    """The job's result, interrupted in three stages on the way: in Ray Data's and, by either signal, in Ray Train's."""
    stop(job, "calibration", signal.SIGINT)
    run_up_to("students", job, "calibration", "probes")
    for number in (signal.SIGINT, signal.SIGTERM):
        stop(job, "students", number)
    run_up_to("finetuning", job, "variants")
    for number in (signal.SIGTERM, signal.SIGINT):
        stop(job, "finetuning", number)
    code, said, error = ppcl("compress", job)
    assert code == 0, said + error
    return job.parent / "result", said


def test_an_interrupted_job_continues_from_what_is_complete(finished):
    _, said = finished
    for stage in STAGES[:5]:
        assert f"{stage}: complete, skipped" in said
    for stage in STAGES[5:]:
        assert f"{stage}: done" in said


def test_the_end_is_a_table_and_a_report(finished):
    result, said = finished
    for heading in (
        "variant",
        "blocks",
        "parameters",
        "share",
        "seconds per step",
        "velocity error",
        "checker score",
        "R",
    ):
        assert heading in said
    assert f"report: {result / 'report.html'}" in said
    assert "<svg" in (result / "report.html").read_text()
    assert "students: done" in (result / "log.txt").read_text()
    assert not list(result.rglob("*.partial")) and not list(result.rglob("checkpoints"))


def test_all_runs_of_the_job_were_tracked_as_one(finished, job):
    (run,) = (job.parent / "tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert {f"seconds/{stage}" for stage in STAGES} <= set(events.Tags()["scalars"])
    trained = [n for n in events.Tags()["scalars"] if n.startswith("students/loss/")]
    for name, steps in ((trained[0], 30), ("finetuning/loss/velocity", 20)):
        losses = events.Scalars(name)
        assert losses[-1].step == steps and all(loss.value > 0 for loss in losses)
    assert any(name.startswith("sensitivity/") for name in events.Tags()["scalars"])
    assert events.Scalars("variants/p90/share")[-1].value <= 0.9
    outcomes = [event.tensor_proto.string_val[0] for event in events.Tensors("outcome/text_summary")]
    assert outcomes[0] == b"killed" and outcomes[-1] == b"finished"


def test_the_same_command_again_computes_nothing(finished, job):
    before = entries(job)
    code, said, _ = ppcl("compress", job)
    assert code == 0 and entries(job) == before
    assert [f"{stage}: complete, skipped" in said for stage in STAGES] == [True] * len(STAGES)


def test_a_damaged_artifact_is_found_by_its_hash_and_made_again(finished, job):
    result, _ = finished
    student = next((result / "students").glob("*.safetensors"))
    content = student.read_bytes()
    tensors = load(content)
    student.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with stages_in_this_process("variants", "finetuning", "evaluation"):
        code, said, error = ppcl("compress", job)
    assert code == 0, said + error
    assert f"students: students/{student.name} is damaged or missing" in said
    assert "students: done" in said and "probes: complete, skipped" in said
    again = load(student.read_bytes())
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_later_stages_are_run_anew_where_lost_variants_are_made_again_and_differ(finished, job, monkeypatch):
    """As on another machine, which rounds otherwise."""
    result, _ = finished
    catalog = result / "variants" / "variants.json"
    before, measure = json.loads(catalog.read_text()), _Evaluator.sensitivities

    def rounded_otherwise(*arguments):
        return {r: replace(sums, error=sums.error * (1 + 1e-9)) for r, sums in measure(*arguments).items()}

    catalog.unlink()
    monkeypatch.setattr(_Evaluator, "sensitivities", rounded_otherwise)
    with stages_in_this_process("variants", "finetuning", "evaluation"):
        code, said, error = ppcl("compress", job)
    assert code == 0, said + error
    assert "variants: variants/variants.json is damaged or missing" in said
    for stage in STAGES[: STAGES.index("variants")]:
        assert f"{stage}: complete, skipped" in said
    for stage in STAGES[STAGES.index("variants") :]:
        assert f"{stage}: done" in said
    again = json.loads(catalog.read_text())
    assert again["variants"] == before["variants"]
    assert again["damage"] == pytest.approx(before["damage"], rel=1e-3) and again["damage"] != before["damage"]


def test_variants_and_generate_from_the_command_line(finished, tmp_path):
    result, _ = finished
    code, said, error = ppcl("variants", result, "--json")
    assert code == 0, error
    rows = json.loads(said)
    assert rows[0]["variant"] == "teacher" and rows[0]["share"] == 1 and len(rows) > 1
    smallest = rows[-1]
    assert smallest["parameters"] < rows[0]["parameters"] and smallest["velocity_error"] > 0
    intervals = ",".join(smallest["plan"])
    pictures = {}
    for name, variant in {"teacher": "teacher", "named": smallest["variant"], "intervals": intervals}.items():
        path = tmp_path / f"{name}.png"
        code, _, error = ppcl("generate", result, "a red circle", "--variant", variant, "-o", path)
        assert code == 0, error
        pictures[name] = Image.open(path)
        assert pictures[name].size == (32, 32)
    assert pictures["named"].tobytes() == pictures["intervals"].tobytes() != pictures["teacher"].tobytes()
    path = tmp_path / "group.png"
    code, said, error = ppcl(
        "generate", result, "a red circle", "--variant", smallest["variant"], "-o", path, "--offload", "group"
    )
    assert code == 0 and "offload: group (one block at a time)" in said, error
    # Sums on a CPU round by where weights lie in memory.
    assert (np.asarray(Image.open(path)) != np.asarray(pictures["named"])).mean() < 0.01


def test_more_workers_than_the_cluster_has_are_refused_at_once(job, ray_cluster, tmp_path):
    code, said, error = ppcl(
        "compress", job, "--output", tmp_path / "other", "--set", "distillation.pipeline_parallel=64"
    )
    assert code == 2 and "asks for 64 workers" in error and "calibration" not in said


def test_a_disk_that_fills_up_is_told_and_the_job_goes_on_when_there_is_space(job, ray_cluster, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        code, said, error = ppcl("compress", job, "--output", disk / "result")
        assert code == 2, said + error
        assert "No space left on device" in error and "free space" in error and error.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        # What follows is not of interest.
        monkeypatch.setattr("jobs.stages.probes.run_worker_group", Mock(side_effect=KeyboardInterrupt))
        with stages_in_this_process("calibration"):
            code, said, _ = ppcl("compress", job, "--output", disk / "result")
        assert code == 130 and "calibration: done" in said
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_the_ablation_uses_what_the_job_has_and_ends_with_a_table(finished, job):
    result, _ = finished
    settings = {"seeds": 2, "steps": 3, "batch_size": 4, "finetuning_steps": 2, "gate_steps": 2, "ffns": 1}
    # Variants that a job names are none of the ablation's plans.
    changes = [f"ablation.{key}={value}" for key, value in settings.items()] + ["finetuning.variants=[p90]"]
    overrides = [part for change in changes for part in ("--set", change)]
    code, said, error = ppcl("ablate", job, *overrides)
    assert code == 0, said + error
    assert "detection: complete, skipped" in said and "Ablation: " in said and "2 seeds" in said
    made = json.loads((result / "ablation" / "ablation.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    for row in ("sensitivity", "probes", "nonsequential", "finetuned", "uniform", "gates", "hidden"):
        mean, low, high = rows[row]["velocity_error"]
        assert low <= mean <= high and mean > 0 and row in rows and rows[row]["label"].strip() in said
    assert rows["ffn"]["share"] < rows["text"]["share"] <= rows["nonsequential"]["share"] < 1
    assert not (result / "ablation" / "runs").exists()
    assert "Ablation</h2>" in (result / "report.html").read_text()
    code, said, _ = ppcl("ablate", job, *overrides)
    assert code == 0 and "ablation: complete, skipped" in said


def test_an_address_where_no_ray_is(job):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        # Bound but not listening: the connection is refused.
        code, _, error = as_process("compress", job, "--address", f"127.0.0.1:{port}")
        assert code == 2 and f"no Ray cluster could be reached at 127.0.0.1:{port}: Connection refused" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "version"), [("ray_version", "2.44.1"), ("python_version", "3.9.18")])
def test_a_cluster_with_another_ray_or_python_is_told(job, ray_cluster, name, version):
    from ray._common.usage import usage_constants
    from ray._private import ray_constants, worker

    where = {"namespace": ray_constants.KV_NAMESPACE_CLUSTER}
    gcs, key = worker.global_worker.gcs_client, usage_constants.CLUSTER_METADATA_KEY
    told = gcs.internal_kv_get(key, **where)
    # What a node of such a cluster writes when it starts.
    gcs.internal_kv_put(key, json.dumps(json.loads(told) | {name: version}).encode(), True, **where)
    try:
        code, _, error = as_process("compress", job, "--address", ray_cluster.get_runtime_context().gcs_address)
    finally:
        gcs.internal_kv_put(key, told, True, **where)
    assert (
        code == 2
        and "runs another Ray or Python than this ppcl" in error
        and version in error
        and error.count("\n") == 1
    )
