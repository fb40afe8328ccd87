"""Whole jobs in which something is killed, stopped or spoilt: what comes out is what an undisturbed job leaves.

`make faults` runs them; each has a real Ray with processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import bucket
from tests.conftest import REPOSITORY
from tests.jobs.test_compress import STAGES

pytestmark = pytest.mark.faults

DEADLINE = 900  # seconds for any one job, on a busy machine
HOOK = Path(__file__).parent / "hook"


@pytest.fixture(scope="module")
def values(tmp_path_factory, teacher_folder):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(f"a {c} {s}" for c in ("red", "green", "blue", "black") for s in ("circle", "square", "cross")))
    return {
        "teacher": str(teacher_folder),
        "prompts": str(prompts),
        "device": "cpu",
        "sampling": {"steps": 3, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "held_out": 0.3, "batch_size": 4},
        "probes": {"workers": 2, "batch_size": 4},
        "width": {"hidden": [], "text": False, "ffns": 1},
        "distillation": {"steps": 60, "batch_size": 4, "warmup": 2, "pipeline": 2, "checkpoint_every": 5},
        "variants": {"budgets": [0.9]},
        "evaluation": {"limit": 2},
    }


class Job:
    """`ppcl compress` as a process of its own."""

    def __init__(self, values, output, fault=None, mark=None, **overrides):
        config = Path(f"{output}.yaml")
        config.write_text(yaml.safe_dump(values | {"output": str(output)}))
        sets = [part for key, value in overrides.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
        environment = dict(os.environ)
        if fault:
            environment |= {"PPCL_FAULT": fault, "PPCL_FAULT_MARK": str(mark)}
            environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), environment["PYTHONPATH"]])
        self.output, self.log = Path(output), Path(f"{output}.{time.monotonic_ns()}.said")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "compress", str(config), *sets], cwd=REPOSITORY, env=environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self):
        return self.log.read_text()

    def wait_until(self, happened):
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def until(self, words):
        """Let it run until it says so; what comes after is not needed, and killed."""
        try:
            self.wait_until(lambda: words in self.said)
        finally:
            self.kill()
        return self

    def end(self, code=0):
        try:
            assert self.process.wait(DEADLINE) == code, self.said
        finally:
            self.kill()
        return self

    def kill(self):
        """The driver, and then whatever of its Ray is left."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        gone, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()


def students(output):
    return {path.name: load_file(path) for path in sorted((Path(output) / "students").glob("*.safetensors"))}


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a
    for name, tensors in a.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, b[name][key], rtol=0, atol=tolerance, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """The folder of a job that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "result"
    return Job(values, output).end().output


@pytest.fixture(scope="module")
def undisturbed(whole):
    return students(whole)


@pytest.fixture
def result(whole, tmp_path):
    """A copy of that folder that has come to the students."""
    return before(whole, "students", tmp_path)


def before(whole, stage, where):
    """A copy of a finished job's folder in which a stage, and what follows it, have not run yet."""
    output = Path(shutil.copytree(whole, where / "result"))
    manifest = json.loads((output / "manifest.json").read_text())
    for name in STAGES[STAGES.index(stage) :]:
        if manifest["stages"].pop(name, None):
            shutil.rmtree(output / name)
    (output / "manifest.json").write_text(json.dumps(manifest))
    return output


@pytest.mark.parametrize(
    ("fault", "stage"),
    [("raises", "students"), ("first killed", "students"), ("last killed", "students"), ("checkpoint", "students"), ("probe", "probes")],
)
def test_a_job_outlives_the_loss_of_a_worker(values, whole, undisturbed, tmp_path, fault, stage):
    job = Job(values, before(whole, stage, tmp_path), fault, tmp_path / "mark").until("variants: ")
    assert (tmp_path / "mark").exists() and job.said.count(f"{stage}: failed (") == 1
    same(students(job.output), undisturbed)
    assert not list(job.output.rglob("*.partial"))


def test_a_job_outlives_the_loss_of_an_evaluator(values, whole, tmp_path):
    job = Job(values, before(whole, "evaluation", tmp_path), "evaluation", tmp_path / "mark").end()
    assert (tmp_path / "mark").exists() and "evaluation: failed (" in job.said
    made, expected = (json.loads((folder / "evaluation" / "evaluation.json").read_text())["variants"] for folder in (job.output, whole))
    assert made.keys() == expected.keys()
    for name, row in made.items():
        assert row["velocity_error"] == pytest.approx(expected[name]["velocity_error"], abs=1e-8)


def test_a_rank_that_stops_answering_is_given_up_after_a_while(values, result, undisturbed, tmp_path):
    job = Job(values, result, "stopped", tmp_path / "mark").until("variants: ")
    assert "students: failed (" in job.said
    same(students(job.output), undisturbed)


def checkpoints(output):
    return list((Path(output) / "students" / "checkpoints").rglob("*.safetensors"))


@pytest.mark.parametrize(("pipeline", "replicas"), [(2, 1), (1, 1), (1, 2)])
def test_a_killed_driver_leaves_what_any_number_of_workers_goes_on_from(values, result, undisturbed, pipeline, replicas):
    job = Job(values, result)
    job.wait_until(lambda: len(checkpoints(job.output)) > 3)
    job.kill()
    assert checkpoints(job.output)
    job = Job(values, result, distillation__pipeline=pipeline, distillation__replicas=replicas).until("variants: ")
    assert "probes: complete, skipped" in job.said
    same(students(job.output), undisturbed)


def test_a_batch_that_is_not_finite_is_left_out_and_told(values, result, tmp_path):
    job = Job(values, result, "nan", tmp_path / "mark").until("variants: ")
    assert "steps were left out, since a batch or a gradient had NaN or infinite values" in job.said
    assert all(t.isfinite().all() for tensors in students(job.output).values() for t in tensors.values())
    assert json.loads((job.output / "manifest.json").read_text())["stages"]["students"]["info"]["skipped_steps"] > 0


def test_a_second_job_on_the_same_output_is_refused_and_the_first_goes_on(values, result, undisturbed):
    first = Job(values, result)
    first.wait_until(lambda: "students: " in first.said)
    second = Job(values, result).end(2)
    assert f"another ppcl works in {result}" in second.said
    same(students(first.until("variants: ").output), undisturbed)


def test_a_bucket_that_fails_for_long_ends_in_one_sentence_and_the_job_goes_on_later(values, undisturbed, s3, tmp_path):
    values = values | {"output": f"{s3.bucket}/result"}
    from ppcl.storage import Store, mirror

    store = Store(values["output"])
    config = tmp_path / "bucket.yaml"
    config.write_text(yaml.safe_dump(values))

    def run():
        return subprocess.run([sys.executable, "-m", "jobs.cli", "compress", str(config)], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE)

    with s3.failing(bucket.error(503, "SlowDown"), lambda r: "students" in r.path and r.method == "PUT"):
        ended = run()
    assert ended.returncode == 2 and "the store of s3://" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    ended = run()
    assert ended.returncode == 0 and "probes: complete, skipped" in ended.stdout, ended.stderr
    assert "manifest.json" in store.objects()
    same(students(mirror(values["output"])), undisturbed)


def test_two_hosts_with_addresses_and_disks_of_their_own_do_a_job_through_a_bucket(values, undisturbed, teacher_folder, tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("network namespaces need root")
    from ppcl.storage import Store, _files

    with bucket.served("0.0.0.0") as proxy:
        for name, value in {**bucket.CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url, "PPCL_SCRATCH": str(tmp_path / "here")}.items():
            monkeypatch.setenv(name, value)
        _files.cache_clear()
        url = f"s3://{bucket.BUCKET}/two"
        store = Store(url)
        for path in sorted(teacher_folder.rglob("*")):
            if path.is_file():
                store.upload(path, f"teacher/{path.relative_to(teacher_folder)}")
        store.upload(Path(values["prompts"]), "prompts.txt")
        config = tmp_path / "job.yaml"
        # Four ranks, of which three go on a node.
        places = {"teacher": f"{url}/teacher", "prompts": f"{url}/prompts.txt", "output": f"{url}/result"}
        config.write_text(yaml.safe_dump(values | places | {"distillation": values["distillation"] | {"replicas": 2}}))
        ended = subprocess.run(
            [REPOSITORY / "cluster" / "two_nodes.sh", sys.executable, "-m", "jobs.cli", "compress", config, "--address", "10.77.0.1:6379"],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE,
            env=os.environ | {
                "AWS_ENDPOINT_URL": f"http://10.77.0.254:{proxy.port}",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            },
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        made = Store(f"{url}/result")
        for name in made.objects("students"):
            if name.endswith(".safetensors"):
                assert made.download(name, tmp_path / "two" / name)
        same(students(tmp_path / "two"), undisturbed)
        _files.cache_clear()
