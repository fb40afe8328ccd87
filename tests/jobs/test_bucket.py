"""A whole job whose teacher, prompts and result lie in a bucket, killed on one node and continued on another."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load

from ppcl.storage import Store
from tests.bucket import error
from tests.conftest import REPOSITORY
from tests.jobs.test_compress import ppcl


@pytest.fixture
def job(s3, teacher_folder, tmp_path):
    """The configuration of a small job, everything in the bucket."""
    store = Store(s3.bucket)
    for path in sorted(teacher_folder.rglob("*")):
        if path.is_file():
            store.upload(path, f"teacher/{path.relative_to(teacher_folder)}")
    prompts = [f"a photo of a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "triangle")]
    store.write("prompts.txt", "\n".join(prompts).encode())
    values = {
        "teacher": f"{s3.bucket}/teacher",
        "prompts": f"{s3.bucket}/prompts.txt",
        "output": f"{s3.bucket}/result",
        "device": "cpu",
        "sampling": {"steps": 3, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "held_out": 0.3},
        "width": {"hidden": [], "text": False, "modulations": False},
        "distillation": {"steps": 40, "batch_size": 4, "warmup": 2, "pipeline": 2, "checkpoint_every": 2},
        "variants": {"budgets": [0.9]},
        "evaluation": {"limit": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def killed_when(job, happened, deadline=240):
    """Start the job and kill all of it, the hard way, as soon as `happened()`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "compress", str(job)], cwd=REPOSITORY, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        begun = time.monotonic()
        while not happened():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() - begun < deadline
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_job_in_a_bucket_is_killed_on_one_node_and_continued_on_another(job, s3, monkeypatch, tmp_path):
    result = Store(f"{s3.bucket}/result")
    killed_when(job, lambda: any("checkpoints" in name and name.endswith(".safetensors") for name in result.objects("students/")))
    assert list(json.loads(result.read("manifest.json"))["stages"]) == ["calibration", "probes", "detection"]
    kept = {name: load(result.read(name)) for name in result.objects("students/checkpoints")}

    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    s3.requests.clear()
    # The store has a bad moment, too.
    with s3.failing(error(503, "SlowDown"), lambda r: r.method == "GET" and r.range is not None, times=2):
        code, said, wrong = ppcl("compress", job)
    assert code == 0, said + wrong
    for stage in ("calibration", "probes", "detection"):
        assert f"{stage}: complete, skipped" in said
    assert f"report: {result.url}/report.html" in said and "p90" in said

    # Two ranks of distillation read their own blocks; only the pipelines that make pictures are whole.
    weights = [r for r in s3.requests if r.method == "GET" and "/teacher/transformer/" in r.path and r.path.endswith("safetensors")]
    assert any(r.range for r in weights)
    manifest = json.loads(result.read("manifest.json"))
    names = {name for entry in manifest["stages"].values() for name in entry["files"]}
    there = {name for name in result.objects() if not name.startswith("cache/")}
    assert there - names == {"manifest.json", "config.json", "log.txt", "report.html"} and names <= there
    assert kept
    for name, tensors in kept.items():
        done = load(result.read(f"students/{name.rpartition('/')[2]}"))
        assert all(torch.isfinite(t).all() for t in done.values()) and len(tensors) > len(done)

    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "a third node"))
    picture = tmp_path / "x.png"
    code, said, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", picture)
    assert code == 0 and picture.exists(), said + wrong
    student = next(name for name in manifest["stages"]["students"]["files"] if name.endswith("safetensors"))
    result.write(student, b"damaged")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "a fourth node"))
    code, _, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", tmp_path / "y.png")
    assert code == 2 and f"{result.url}/{student} is damaged or gone" in wrong and wrong.count("\n") == 1
