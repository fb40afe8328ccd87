"""GPUs that other jobs of a cluster use: who does, and waiting for them. Ray takes this machine's word for its GPUs."""

import re
import subprocess
import sys
import threading

import pytest

from jobs.runtime import resources, usage
from jobs.runtime.resources import Resources
from ppcl.errors import UserError
from tests.conftest import REPOSITORY

# Connects to a cluster, takes what its arguments say, and holds it until its input ends.
_HOLDER = """
import sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False)
in_group, by_actor, by_task, mode = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]


@ray.remote
class Actor:
    def ready(self):
        pass


@ray.remote(num_cpus=0, max_retries=0)
def task(started):
    import time

    ray.get(started.ready.remote())
    while True:
        time.sleep(1)


if in_group:
    group = ray.util.placement_group([{"GPU": 1}] * in_group)
    assert group.wait(60)
    in_it = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
    ray.get(Actor.options(num_cpus=0, num_gpus=1, scheduling_strategy=in_it).remote().ready.remote())
if by_actor:
    actor = Actor.options(num_cpus=0, num_gpus=by_actor).remote()
    ray.get(actor.ready.remote())
if by_task:
    signal = Actor.options(num_cpus=0).remote()
    running = task.options(num_gpus=by_task).remote(signal)
    while ray.available_resources().get("GPU", 0) > 8 - in_group - by_actor - by_task:
        pass
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster of 8 GPUs and 4 CPUs, whose driver is a process of its own: `cluster(function, ...)` calls it there."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start) as pool:
        yield lambda *call: pool.submit(*call).result(240)


def _start():
    import ray

    ray.init("local", num_cpus=4, num_gpus=8, include_dashboard=False, log_to_driver=False)


def _address():
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def held(cluster):
    """`held(in_group, by_actor, by_task)`: another job that holds so many GPUs; gives its process."""
    holders = []

    def hold(*amounts):
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, cluster(_address), *map(str, amounts), "--password=secret"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout.readline() == "ready\n"
        return holder

    yield hold
    for holder in holders:
        holder.stdin.close()
        assert holder.wait(60) == 0
    cluster(_until_free)


def _until_free():
    import time

    deadline = time.monotonic() + 60
    while usage.free("GPU") < 8:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _told():
    return usage.told(usage.usage("GPU")), usage.free("GPU")


def _waited(workers, timeout_s, look_every=0.2, release=None):
    """What a wait for GPUs reported. `release`: a file that is made once the wait has reported who holds them."""
    resources._LOOK_EVERY = look_every
    said, seen = [], threading.Event()

    def progress(done, total=None, values=None, phase=None):
        said.append(phase)
        if release is not None and not seen.is_set():
            seen.set()
            release.touch()

    Resources(workers, "cuda", "distillation.data_parallel", 60.0, timeout_s).wait_until_free(progress)
    return list(dict.fromkeys(said))


def test_gpus_that_nobody_uses_are_not_waited_for(cluster):
    assert cluster(_told) == ("none is in use", 8)
    assert cluster(_waited, 8, 60.0) == []


def test_the_jobs_that_use_gpus_are_told_by_their_driver_without_its_arguments(cluster, held):
    held(3, 2, 1)
    told, free = cluster(_told)
    assert re.fullmatch(r"6 are in use: 5 by job \d{2}000000 \(python on [\d.]+\), 1 by tasks", told) and free == 2
    held(0, 1, 0)
    told, free = cluster(_told)
    assert re.fullmatch(r"7 are in use: 5 by job \w+ \(.*\), 1 by job \w+ \(.*\), 1 by tasks", told) and free == 1
    assert "secret" not in told


def test_gpus_in_use_are_waited_for_and_taken_when_they_are_free(cluster, held, tmp_path):
    holder, released = held(0, 6, 0), tmp_path / "released"

    def end():
        while not released.exists():
            if over.wait(0.05):
                return
        holder.stdin.close()

    over = threading.Event()
    thread = threading.Thread(target=end)
    thread.start()
    try:
        said = cluster(_waited, 4, 200.0, 0.2, released)
    finally:
        over.set()
        thread.join()
    assert re.fullmatch(r"waiting for 4 GPUs; 8 exist, 6 are in use by job \w+ \(python on [\d.]+\)", said[0])
    assert said[-1] == "starting workers"


def test_gpus_that_stay_in_use_are_told_in_one_sentence_at_the_limit(cluster, held):
    held(6, 0, 0)
    told = (
        r"distillation.data_parallel needs 4 GPUs and waited 1 s for them: 8 exist, 6 are in use by job \w+ "
        r"\(python on [\d.]+\); the same command continues when they are free; ask for fewer, or raise busy_timeout_s"
    )
    with pytest.raises(UserError, match=f"^{told}$"):
        cluster(_waited, 4, 1.0)
    # What was asked for is asked for no longer.
    assert cluster(_told)[1] == 2


def _own():
    """Whether this job's own use of all GPUs is waited for."""
    import ray

    group = ray.util.placement_group([{"GPU": 1}] * 8)
    assert group.wait(60)
    busy = Resources(8, "cuda", "probes.workers", 60.0, 0.0).busy()
    told = usage.told(usage.usage("GPU"))
    ray.util.remove_placement_group(group)
    return busy, told


def test_what_the_job_itself_uses_is_not_waited_for(cluster):
    assert cluster(_own) == (None, "8 are in use by this job")


@pytest.mark.parametrize(
    ("entrypoint", "program"),
    [
        ("python train.py --token secret", "train.py"),
        ("/usr/bin/python3.11 -u /home/me/train.py secret", "train.py"),
        ("python -m package.train --key secret", "package.train"),
        ("ppcl compress job.yaml", "ppcl"),
        ("python", "python"),
        ("/usr/bin/python3 -c import secret; print(1)", "python3"),
        ("", "a driver"),
        ("python 'unclosed", "'unclosed"),
    ],
)
def test_a_program_is_its_name_alone(entrypoint, program):
    assert usage._program(entrypoint) == program
