"""The memory of a cluster's devices, and a job that does not fit."""

import io
import os

import psutil
import pytest
from rich.console import Console

from jobs.pipeline import Job
from jobs.runtime import device_memory
from jobs.runtime.device_memory import places
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.sizing.fit import Place


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an nvidia-smi that says this first on the path."""

    def put(said):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{said}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return put


def test_a_node_tells_the_memory_of_its_largest_gpu(driver):
    driver("echo 24564; echo 81559")
    assert device_memory._gpu_bytes() == 81559 * 2**20


@pytest.mark.parametrize("said", ["exit 9", "echo no devices were found"])
def test_a_driver_that_fails_tells_nothing(driver, said):
    driver(said)
    assert device_memory._gpu_bytes() is None


def test_on_cpus_the_nodes_count_with_their_cpus_and_without_gpus_nothing_is_known(ray_cluster):
    assert places("cpu") == [Place(psutil.virtual_memory().total, 4)]
    assert places("cuda") == []


def test_a_job_that_does_not_fit_is_refused_before_its_first_stage(ray_cluster, teacher_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    config = Config(
        teacher=teacher_folder,
        prompts=tmp_path / "prompts.txt",
        output=tmp_path / "out",
        sampling={"height": 32, "width": 32},
    )
    monkeypatch.setattr("jobs.runtime.device_memory._node_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"^calibration needs .* for each encoder.* the largest node here has 0.001 GB"):
        Job(config, Console(file=io.StringIO())).run("cpu")
    assert not (tmp_path / "out" / "calibration").exists() and not (tmp_path / "out" / "config.json").exists()


def test_a_job_whose_workers_do_not_fit_together_is_refused(ray_cluster, teacher_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")

    def run(workers):
        config = Config(
            teacher=teacher_folder,
            prompts=tmp_path / "prompts.txt",
            output=tmp_path / f"out-{workers}",
            sampling={"height": 32, "width": 32},
            calibration={"workers": workers},
        )
        job = Job(config, Console(file=io.StringIO()))
        monkeypatch.setattr(job, "run_stage", lambda *asked: pytest.fail("started"))
        job.run("cpu")

    # Room for two encoders.
    monkeypatch.setattr("jobs.runtime.device_memory._node_bytes", lambda: 250_000_000)
    with pytest.raises(pytest.fail.Exception, match="started"):
        run(1)
    told = "^calibration needs .* for each encoder, .*, 3 of them share a node, .*; set calibration.workers to 2 or"
    with pytest.raises(UserError, match=told):
        run(3)
