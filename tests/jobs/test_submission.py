"""Jobs sent to a real cluster with a dashboard, by the command line alone.

Teacher, prompts and result lie in a bucket. The first job is sent by a process of its own, and so is what Ctrl-C
interrupts; other commands run here, which is the same code without three seconds of imports.
"""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load

from jobs.submission import Jobs
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.replacements import Interval, LinearFfn, parse_name, parse_replacement
from ppcl.storage.object_store import Store, _files
from tests import bucket
from tests.commands import as_process
from tests.commands import in_process as ppcl
from tests.heads import between, free_port, started

pytestmark = pytest.mark.dashboard


@pytest.fixture(scope="module")
def store(s3_server, tmp_path_factory):
    """A place in a bucket, known to this process and to all it starts.

    `store.scratch` is what the cluster's node keeps of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        scratch = tmp_path_factory.mktemp("node") / "scratch"
        for name, value in {
            **bucket.CREDENTIALS,
            "AWS_ENDPOINT_URL": s3_server.url,
            "PPCL_SCRATCH": str(scratch),
        }.items():
            patch.setenv(name, value)
        _files.cache_clear()
        made = Store(f"s3://{bucket.BUCKET}/submitted")
        made.scratch = scratch
        yield made
    _files.cache_clear()


@pytest.fixture(scope="module")
def cluster(store, tmp_path_factory):
    with started(tmp_path_factory.mktemp("away")) as started_head:
        yield started_head


@pytest.fixture(scope="module")
def head(cluster):
    return cluster.api


@pytest.fixture(scope="module")
def job(store, tmp_path_factory, teacher_folder):
    for path in sorted(teacher_folder.rglob("*")):
        if path.is_file():
            store.upload(path, f"teacher/{path.relative_to(teacher_folder)}")
    prompts = [f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "cross")]
    store.write("prompts.txt", "\n".join(prompts).encode())
    values = {
        "teacher": f"{store.url}/teacher",
        "prompts": f"{store.url}/prompts.txt",
        "output": f"{store.url}/result",
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "validation": 0.3},
        "detection": {"method": "first_difference"},
        "width": {"ffn_keep_percents": [], "text": False, "low_rank_modulations": False},
        "distillation": {"steps": 40, "batch_size": 4, "warmup": 2, "pipeline_parallel": 2, "checkpoint_every": 2},
        "variants": {"budgets": [0.9]},
        "evaluation": {"max_prompts": 2},
    }
    path = tmp_path_factory.mktemp("job") / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def status(head, *job):
    code, said, wrong = ppcl("status", *job, "--address", head, "--json")
    assert code == 0, wrong
    return json.loads(said)


def test_a_cluster_without_jobs_says_so(head):
    code, said, _ = ppcl("list", "--address", head)
    assert code == 0 and said == f"no ppcl jobs at {head}\n"
    for command in ("status", "logs", "stop"):
        code, _, wrong = ppcl(command, "--address", head)
        assert code == 2 and "has no ppcl job; send one with ppcl submit" in wrong


def test_what_the_cluster_can_never_have_is_told_at_once(head, job):
    code, said, wrong = ppcl(
        "submit", job, "--address", head, "--output", job.parent / "big", "--set", "distillation.pipeline_parallel=64"
    )
    assert code == 2 and "asks for 64 workers, but the cluster has 4 CPUs" in wrong and wrong.count("\n") == 1, (
        said + wrong
    )


def checkpoints(store):
    """The checkpoints in the bucket: tensors by replacement."""
    names = store.objects("result/students/checkpoints")
    return {parse_name(Path(name).stem): load(store.read(name)) for name in names}


def has_checkpoints(store):
    """Whether the bucket has a checkpoint of every replacement, and the students' are of a step after the first."""
    if not store.objects("result/students/checkpoints"):
        return False
    plan = map(parse_replacement, json.loads(store.read("result/detection/detection.json"))["plan"])
    kept = checkpoints(store)
    return all(r in kept and (not isinstance(r, Interval) or any(n.startswith("step.") for n in kept[r])) for r in plan)


@pytest.fixture(scope="module")
def stopped(head, job, store, s3_server):
    """The id of a job that was stopped in its distillation, when checkpoints of it were in the bucket."""
    code, said, wrong = as_process("submit", job, "--address", head)
    assert code == 0, said + wrong
    first = re.match(r"(ppcl-\w{8}-1): sent", said)[1]
    assert f"{first}: RUNNING, calibration" in said
    code, _, wrong = ppcl("submit", job, "--address", head)
    assert code == 2 and f"the job {first} works on {store.url}/result already" in wrong

    # The stage cannot end before it is stopped: what it made does not go up.
    stopped, failure = threading.Event(), bucket.error(503, "SlowDown")
    with s3_server.failing(
        lambda r: stopped.wait(240) and failure(r), lambda r: r.method == "PUT" and "/students/0" in r.path
    ):
        deadline = time.monotonic() + 240
        while not has_checkpoints(store):
            now = status(head)
            assert now["state"] in ("PENDING", "RUNNING"), now
            assert time.monotonic() < deadline
            time.sleep(0.5)
        now = status(head)
        assert now["id"] == first and now["output"] == f"{store.url}/result" and now["begun"] and not now["ended"]
        assert now["stage"] == "students" and now["complete"] == ["calibration", "probes", "detection"]
        code, said, wrong = ppcl("stop", "--address", head)
        stopped.set()
    assert code == 0 and f"{first}: STOPPED" in said, said + wrong
    return first


def test_a_stopped_job_says_so_and_has_left_what_it_completed(head, stopped, store):
    code, _, wrong = ppcl("stop", stopped, "--address", head)
    assert code == 2 and "has ended already" in wrong
    assert "ppcl: stopped; the same command continues" in ppcl("logs", stopped, "--address", head)[1]
    assert list(json.loads(store.read("result/manifest.json"))["stages"]) == ["calibration", "probes", "detection"]
    assert "result/lock.json" not in store.objects()


@pytest.fixture(scope="module")
def continued(head, stopped, job, store, s3_server):
    """What the job said that was sent again, to a node without the first one's files; and the checkpoints it found."""
    kept = checkpoints(store)
    shutil.rmtree(store.scratch)
    s3_server.requests.clear()
    # The store has a bad moment, too.
    with s3_server.failing(bucket.error(503, "SlowDown"), lambda r: r.method == "GET" and r.range is not None, times=2):
        code, said, wrong = ppcl("submit", job, "--address", head, "--follow")
    assert code == 0, said + wrong
    return said, kept


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head, stopped, continued, store):
    said, _ = continued
    for stage in ("calibration", "probes", "detection"):
        assert f"{stage}: complete, skipped" in said
    assert "students: done" in said and "evaluation: done" in said and "p90" in said
    last = status(head)
    assert (
        last["state"] == "SUCCEEDED"
        and last["report"] == f"{store.url}/result/report.html"
        and last["id"] == stopped[:-1] + "2"
    )
    code, said, _ = ppcl("list", "--address", head)
    assert [line.split(",")[0] for line in said.splitlines()[-2:]] == [
        f"{stopped}: STOPPED",
        f"{last['id']}: SUCCEEDED",
    ]


def test_the_bucket_holds_what_the_manifest_names_and_weights_were_read_by_range(continued, store, s3_server):
    _, kept = continued
    # Two ranks of distillation read their own blocks; only the pipelines that make pictures are whole.
    weights = [
        r
        for r in s3_server.requests
        if r.method == "GET" and "/teacher/transformer/" in r.path and r.path.endswith("safetensors")
    ]
    assert any(r.range for r in weights)
    result = Store(f"{store.url}/result")
    manifest = json.loads(result.read("manifest.json"))
    names = {name for entry in manifest["stages"].values() for name in entry["files"]}
    there = {name for name in result.objects() if not name.startswith("cache/")}
    assert (
        there - names == {"manifest.json", "config.json", "log.txt", "events.jsonl", "report.html"} and names <= there
    )
    assert {type(replacement) for replacement in kept} == {Interval, LinearFfn}
    for replacement, tensors in kept.items():
        done = load(result.read(f"students/{replacement.name}.safetensors"))
        assert all(t.isfinite().all() for t in done.values())
        if isinstance(replacement, Interval):  # trained by gradient: its optimizer was kept, too
            parts = ("parameter", "exp_avg", "exp_avg_sq", "step")
            assert tensors.keys() == {f"{part}.{name}" for part in parts for name in done}
        else:  # a linear FFN is the least-squares map, and was kept as it is
            assert tensors.keys() == done.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in done.items())


def test_a_result_in_a_bucket_is_opened_anywhere_and_a_damaged_one_is_told(continued, store, monkeypatch, tmp_path):
    result = Store(f"{store.url}/result")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    picture = tmp_path / "x.png"
    code, said, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", picture)
    assert code == 0 and picture.exists(), said + wrong
    student = next(name for name in result.objects("students") if name.endswith("safetensors"))
    result.write(student, b"damaged")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "a third node"))
    code, _, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", tmp_path / "y.png")
    assert code == 2 and f"{result.url}/{student} is damaged or missing" in wrong and wrong.count("\n") == 1


def test_the_address_that_is_given_counts_and_not_that_of_the_environment(head, monkeypatch):
    known = [job.id for job in Jobs(head).all()]
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert [job.id for job in Jobs(head).all()] == known
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


def test_a_job_that_is_not_there_is_told_with_those_that_are(head):
    for command in (["status"], ["logs"], ["logs", "-f"], ["stop"]):
        code, _, wrong = ppcl(command[0], "no-such-job", *command[1:], "--address", head)
        assert code == 2 and "there is no job 'no-such-job'" in wrong and wrong.count("\n") == 1


def sent(head, identity, command):
    """A job of ppcl to the job API, but with a command of the test's own; gives its id."""
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head).submit_job(
        entrypoint=command, submission_id=identity, metadata={"ppcl": "compress", "output": "/nowhere"}
    )


def ended(head, identity):
    deadline = time.monotonic() + 120
    while (now := status(head, identity))["state"] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    return now


COUNTING = "for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep 0.2; done"


def test_a_job_is_sent_once_by_two_who_send_it_at_once(head, store):
    both = threading.Barrier(2, timeout=60)

    class Simultaneous(Jobs):
        def _details(self):
            found = super()._details()
            both.wait()
            return found

    config, told = Config(teacher="t", prompts="p", output=f"{store.url}/once"), []

    def submit():
        try:
            told.append(("sent", Simultaneous(head).submit(config)))
        except UserError as error:
            told.append(("taken", str(error)))

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (_, identity), (_, sentence) = sorted(told)
    assert sentence == f"the job {identity} works on {store.url}/once already; `ppcl logs {identity} -f` follows it"
    assert ended(head, identity)["state"] == "FAILED"  # there is no such teacher


def test_what_the_nodes_have_not_installed_is_told(head, store, monkeypatch):
    from jobs import submission

    monkeypatch.setattr(submission, "_NEEDED", (*submission._NEEDED, "no_such_package", "nor_this"))
    jobs = Jobs(head)
    identity = jobs.submit(Config(teacher="t", prompts="p", output=f"{store.url}/lacking"))
    with pytest.raises(
        UserError,
        match=f"the job {identity} failed: the cluster has no no_such_package, nor_this; install the dependencies",
    ):
        jobs.wait_until_begun(identity)


def test_a_job_without_a_last_word_is_told_by_the_end_of_its_log(head):
    sent(head, "wordless-1", "python -c 'import no_such_package'")
    error = ended(head, "wordless-1")["error"]
    assert error == (
        "Job entrypoint command failed with exit code 1: ModuleNotFoundError: No module named 'no_such_package'; "
        "submitting the same configuration again continues it"
    )
    code, _, wrong = ppcl("logs", "wordless-1", "-f", "--address", head)
    assert code == 2 and wrong.endswith(f"ppcl: the job wordless-1 failed: {error}\n")


def test_a_job_whose_log_cannot_be_read_is_listed_all_the_same(cluster, head):
    sent(head, "unreadable-1", "echo good")
    sent(head, "unreadable-2", "echo 'ppcl: no good'; exit 1")
    for identity in ("unreadable-1", "unreadable-2"):
        ended(head, identity)
        log = cluster.logs / f"job-driver-{identity}.log"
        log.unlink()
        log.mkdir()  # the head answers 500 from now on
    code, said, wrong = ppcl("list", "--address", head)
    assert code == 0, wrong
    good, bad = (next(line for line in said.splitlines() if line.startswith(f"unreadable-{n}: ")) for n in (1, 2))
    assert "SUCCEEDED" in good and "its log cannot be read: the cluster at" in good and "Is a directory" in good
    assert bad.endswith("FAILED, output: /nowhere, no good")
    code, said, wrong = ppcl("logs", "unreadable-1", "--address", head)
    assert code == 2 and "could not answer" in wrong and wrong.count("\n") == 1
    code, said, wrong = ppcl("logs", "unreadable-1", "-f", "--address", head)
    assert code == 0 and "the rest of its log cannot be read" in said, wrong


def test_a_head_that_has_just_started_is_waited_for(head, store):
    """Its agents, which start jobs, come some seconds after its API."""
    agentless = [None, None]
    with between(head, [], agentless) as address:
        identity = Jobs(address).submit(Config(teacher="t", prompts="p", output=f"{store.url}/just-started"))
    try:
        assert not agentless and identity in [job.id for job in Jobs(head).all()]
    finally:
        Jobs(head).stop(identity)


def test_following_goes_on_over_connections_that_end_and_says_nothing_twice(head, tmp_path):
    # It ends when all its connections have.
    sent(head, "counting-1", f"{COUNTING}; while [ ! -e {tmp_path}/end ]; do sleep 0.2; done; echo line 9")
    breaks = ["closed", "broken", "closed"]

    def end():
        deadline = time.monotonic() + 90
        while breaks and time.monotonic() < deadline:
            time.sleep(0.1)
        (tmp_path / "end").touch()

    waiting = threading.Thread(target=end)
    waiting.start()
    with between(head, breaks) as address:
        code, said, wrong = ppcl("logs", "counting-1", "-f", "--address", address)
    waiting.join()
    assert code == 0 and not breaks and not wrong, wrong
    assert re.findall(r"^line \d", said, re.M) == [f"line {n}" for n in range(1, 10)]


def test_following_gives_up_where_nothing_can_be_had_any_more(head, monkeypatch):
    from jobs import submission

    sent(head, "lost-1", "sleep 600")
    monkeypatch.setattr(submission, "_RECONNECTS", 2)
    with between(head, []) as address:
        jobs = Jobs(address)
    with pytest.raises(
        UserError, match="the job lost-1 cannot be followed: the cluster at .* does not answer any more"
    ):
        jobs.follow("lost-1", print)
    assert Jobs(head).stop("lost-1").state == "STOPPED"


def test_ctrl_c_ends_the_following_and_not_the_job(head):
    sent(head, "counting-2", f"{COUNTING}; sleep 600")
    code, _, wrong = as_process("logs", "-f", "--address", head, stop_at="line 2")
    assert code == 130
    assert (
        wrong
        == "ppcl: the job counting-2 continues; `ppcl logs counting-2 -f` follows it, `ppcl stop counting-2` ends it\n"
    )
    assert status(head, "counting-2")["state"] == "RUNNING"
    code, said, _ = ppcl("stop", "counting-2", "--address", head)
    assert code == 0 and "counting-2: STOPPED" in said


def test_an_address_where_nothing_or_something_else_is(job):
    code, _, wrong = ppcl("submit", job, "--address", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "nothing answers at http://127.0.0.1:" in wrong and wrong.count("\n") == 1
    code, _, wrong = ppcl("status", "--address", "head:8265")
    assert code == 2 and "'head:8265' is not an address of Ray's job API" in wrong
