"""Jobs on clusters of several nodes: one is lost in each stage, clocks differ, hosts share nothing but a bucket."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from glob import glob
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors import safe_open

from tests import bucket
from tests.conftest import REPOSITORY
from tests.faults.jobs import (
    DEADLINE,
    Job,
    before,
    checkpoints,
    environment,
    same,
    students,
    trained_no_more_than_needed,
)
from tests.faults.test_workers import SILENT, same_errors, same_files, same_probes

pytestmark = pytest.mark.faults


@contextlib.contextmanager
def cluster(*nodes):
    """A head that does no work and nodes with processes of their own, each `(CPUs, environment)`; gives the address."""
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    with (
        tempfile.TemporaryDirectory(prefix="ppcl", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        # No other Ray of this machine finds it there. The path is short since sockets' names must be.
        patch.setenv("RAY_TMPDIR", folder)
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory},
        )
        try:
            for cpus, env in nodes:
                with pytest.MonkeyPatch.context() as of_the_node:
                    for name, value in env.items():
                        of_the_node.setenv(name, value)
                    made.add_node(num_cpus=cpus, object_store_memory=memory)
            yield made.address
        finally:
            # The workers of a raylet that was killed are gone with it.
            made.shutdown()


@pytest.mark.parametrize("stage", ["calibration", "probes", "students", "evaluation"])
def test_a_job_outlives_the_loss_of_a_node(values, whole, undisturbed, tmp_path, stage):
    output = before(whole, stage, tmp_path)
    if stage == "calibration":
        shutil.rmtree(output / "cache")
    env = environment(f"node in {stage}", tmp_path / "mark", Path(f"{output}.tally"))
    with cluster((3, env), (3, env)) as address:
        job = Job(values, output, address=address)
        job.end() if stage == "evaluation" else job.until(
            {"calibration": "probes: ", "probes": "detection: ", "students": "variants: "}[stage]
        )
    assert (tmp_path / "mark").exists()
    # Ray Data goes on by itself.
    assert job.said.count(f"{stage}: failed (") == (stage != "calibration")
    if stage == "students":
        same(students(output), undisturbed)
        trained_no_more_than_needed(job.tally)
    elif stage == "evaluation":
        same_errors(output, whole)
    elif stage == "probes":
        same_probes(output, whole)
    else:
        same_files(output, whole, stage)


def test_where_there_are_more_nodes_others_do_what_a_worker_of_calibration_does_not(values, whole, tmp_path):
    output = before(whole, "calibration", tmp_path)
    shutil.rmtree(output / "cache")
    env = environment("calibration stopped", tmp_path / "mark")
    with cluster((3, env), (3, env)) as address:
        job = Job(values, output, address=address, worker_timeout_s=20).until("probes: ")
    assert re.search(rf"calibration: a worker of calibration {SILENT}; others did its work", job.said)
    same_files(output, whole, "calibration")


def test_a_node_that_is_missing_is_waited_for_and_then_told(values, result, tmp_path):
    env = environment("node in students", tmp_path / "mark")
    with cluster((2, env), (2, env)) as address:
        job = Job(values, result, address=address, worker_timeout_s=20).end(2)
    told = (
        "distillation.pipeline_parallel × distillation.data_parallel asks for 2 workers, but the cluster has 2 CPUs, "
        "of which 1 can be used by workers"
    )
    assert f"students: waiting for nodes, 20 s from the last new one: {told}" in job.said and job.error.startswith(
        f"ppcl: {told}"
    )


def faketime():
    """Debian's libfaketime, installed where it is missing and this user may."""
    if not glob("/usr/lib/*/faketime/libfaketime.so.1") and not os.geteuid():
        subprocess.run(
            ["apt-get", "install", "-y", "--no-install-recommends", "libfaketime"], capture_output=True, timeout=300
        )
    found = glob("/usr/lib/*/faketime/libfaketime.so.1")
    if not found:
        pytest.skip("libfaketime is not there and could not be installed")
    return found[0]


def test_nodes_whose_clocks_are_hours_apart_do_a_job_through_a_bucket(values, whole, undisturbed, s3, tmp_path):
    from ppcl.storage.node_cache import mirror
    from ppcl.storage.object_store import Store

    library, url = faketime(), f"{s3.bucket}/result"
    store = Store(url)
    for path in before(whole, "students", tmp_path).rglob("*"):
        if path.is_file() and path.name != "log.txt":
            store.upload(path, str(path.relative_to(tmp_path / "result")))

    def clock(hours):
        return {
            "LD_PRELOAD": library,
            "FAKETIME": f"{hours:+d}h",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "0",
        }

    beside = tmp_path / "job"
    env = environment()
    # A place for one rank on each: the pipeline goes over two.
    with cluster((1, env), (1, env | clock(5)), (1, env | clock(-7))) as address:
        dead, failure = threading.Event(), bucket.error(503, "SlowDown")
        # The first cannot end its students before it is killed: they do not go up.
        with s3.failing(
            lambda r: dead.wait(DEADLINE) and failure(r), lambda r: r.method == "PUT" and "/students/0" in r.path
        ):
            first = Job(values, url, address=address, beside=beside)
            first.wait_until(lambda: any("checkpoints" in name for name in store.objects("students")))
            second = Job(values, url, address=address, beside=tmp_path / "second", env=clock(9)).end(2)
            assert f"another ppcl job is writing to {url}" in second.said
            first.kill()
            dead.set()
        third = Job(values, url, address=address, beside=beside, env=clock(-9)).until("variants: ")
    assert "probes: complete, skipped" in third.said and "students: done" in third.said
    same(students(mirror(url)), undisturbed)


def test_two_hosts_with_addresses_and_disks_of_their_own_do_a_job_through_a_bucket(
    values, undisturbed, teacher_folder, tmp_path, monkeypatch
):
    if os.geteuid():
        pytest.skip("network namespaces need root")
    from ppcl.storage.object_store import Store, _files

    with bucket.served("0.0.0.0") as proxy:
        for name, value in {
            **bucket.CREDENTIALS,
            "AWS_ENDPOINT_URL": proxy.url,
            "PPCL_SCRATCH": str(tmp_path / "here"),
        }.items():
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
        config.write_text(
            yaml.safe_dump(values | places | {"distillation": values["distillation"] | {"data_parallel": 2}})
        )
        ended = subprocess.run(
            [
                REPOSITORY / "cluster" / "two_nodes.sh",
                sys.executable,
                "-m",
                "jobs.cli.main",
                "compress",
                config,
                "--address",
                "10.77.0.1:6379",
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            env=os.environ
            | {
                "AWS_ENDPOINT_URL": f"http://10.77.0.254:{proxy.port}",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            },
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        made = Store(f"{url}/result")
        for name in made.objects("students"):
            if name.endswith(".safetensors"):
                assert made.download(name, tmp_path / "two" / name)
        same(students(tmp_path / "two"), undisturbed)
        _files.cache_clear()


def kept_steps(result):
    """By replacement, the step of its checkpoint."""
    return {path.stem: int(safe_open(path, "pt").metadata()["step"]) for path in checkpoints(result)}


def test_a_coordinator_that_is_killed_is_told_by_status_and_submitting_again_continues(
    head, values, result, undisturbed, tmp_path
):
    from tests.commands import as_process as ppcl
    from tests.jobs.test_submission import status

    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(values | {"output": str(result)}))
    code, said, wrong = ppcl("submit", config, "--address", head)
    assert code == 0, said + wrong
    deadline = time.monotonic() + DEADLINE
    # The first ones are of the closed form, before any step.
    while len(checkpoints(result)) < 4 or not min(kept_steps(result).values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (driver,) = (
        p
        for p in psutil.process_iter(["cmdline"])
        if p.info["cmdline"]
        and p.info["cmdline"][1:4] == ["-m", "jobs.cli.main", "compress"]
        and "auto" in p.info["cmdline"]
    )
    driver.kill()
    while status(head)["state"] == "RUNNING":
        assert time.monotonic() < deadline
    code, said, wrong = ppcl("status", "--address", head)
    # A shell may stand between, and gives the signal another number.
    assert code == 0 and re.search(
        r"FAILED, students.* failed with exit code (137|-9)(: Killed)?; "
        r"submitting the same configuration again continues it",
        said,
    ), said
    kept = kept_steps(result)
    code, said, wrong = ppcl("submit", config, "--address", head, "--follow")
    assert code == 0, said + wrong
    assert "probes: complete, skipped" in said and "students: done" in said
    # What it told first was a step after those that were kept.
    assert int(re.search(r"students: (\d+) of 60", said)[1]) > min(kept.values()) > 0
    same(students(result), undisturbed)
