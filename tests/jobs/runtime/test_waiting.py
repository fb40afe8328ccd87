"""Workers of a running stage that wait for what another job took meanwhile: they tell, and the limit holds."""

import re
import subprocess
import sys

import pytest

from jobs.runtime import tasks, usage
from jobs.runtime.evaluator_pool import EvaluatorPool
from jobs.runtime.resources import Resources
from jobs.runtime.tasks import task_results
from jobs.runtime.watchdog import Watchdog
from ppcl.config.schema import Config
from ppcl.errors import UserError
from tests import made_result
from tests.conftest import REPOSITORY
from tests.stage_context import context

# Connects to a cluster and holds CPUs of it until its input ends.
_HOLDER = """
import sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False)


@ray.remote(num_cpus=int(sys.argv[2]))
class Actor:
    def ready(self):
        pass


actor = Actor.remote()
ray.get(actor.ready.remote())
print("ready", flush=True)
sys.stdin.read()
"""
TOLD = r"waiting for 2 CPUs; 4 exist, 4 are in use by job \w+ \(python on [\d.]+\)"
ENDED = (
    r"{} needs {} CPUs and waited 1 s for them: 4 exist, .* are in use.* by job \w+ \(python on [\d.]+\).*; the same "
    "command continues when they are free; ask for fewer, or raise busy_timeout_s"
)


@pytest.fixture
def hold(ray_cluster):
    """`hold(cpus)`: another job that has so many of the 4 CPUs; gives a function that ends it."""
    holders = []

    def start(cpus):
        address = ray_cluster.get_runtime_context().gcs_address
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, address, str(cpus)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout.readline() == "ready\n"
        return holder.stdin.close

    yield start
    for holder in holders:
        holder.stdin.close()
        assert holder.wait(60) == 0


class _Listener:
    """Hears the phases of a stage; `release` is called when there is one."""

    def __init__(self, release):
        self.said, self.release = [], release

    def __call__(self, done, total=None, values=None, phase=None):
        if phase:
            self.tell(phase)

    def tell(self, sentence):
        self.said.append(sentence)
        self.release()


def _evaluators(root, teacher_folder, tmp_path, listener, **settings):
    config = Config(
        teacher=teacher_folder,
        prompts=tmp_path / "prompts.txt",
        device="cpu",
        evaluation={"workers": 2},
        worker_timeout_s=20,
        **settings,
    )
    return context(config, tmp_path / "variants", listener, students=root / "students")


def test_evaluators_tell_who_was_faster_and_go_on_when_it_ends(hold, teacher_folder, tmp_path):
    root = made_result.result(tmp_path / "job", teacher_folder)
    listener = _Listener(hold(3))
    with EvaluatorPool(_evaluators(root, teacher_folder, tmp_path, listener)) as evaluators:
        assert evaluators.one(lambda a: a.finetuned.remote({"teacher": ()})) == {"teacher": False}
    told = r"waiting for 3 CPUs; 4 exist, 4 are in use: 3 by job \w+ \(python on [\d.]+\), 1 by this job"
    assert re.fullmatch(told, listener.said[0])
    assert set(listener.said[1:]) <= {listener.said[0], "starting workers"}


def test_evaluators_wait_for_other_jobs_no_longer_than_the_limit(hold, teacher_folder, tmp_path):
    root = made_result.result(tmp_path / "job", teacher_folder)
    hold(3)
    given = _evaluators(root, teacher_folder, tmp_path, _Listener(lambda: None), busy_timeout_s=1)
    with (
        pytest.raises(UserError, match=f"^{ENDED.format('evaluation.workers', 3)}$"),
        EvaluatorPool(given) as evaluators,
    ):
        evaluators.one(lambda a: a.finetuned.remote({}))


def test_a_worker_that_takes_long_to_start_waits_for_nobody(ray_cluster):
    @ray_cluster.remote(num_cpus=3)
    class Slow:
        def __init__(self, heartbeat):
            import time

            time.sleep(8)
            heartbeat.start()

        def ready(self):
            return True

    said = []
    with Watchdog("a worker", Resources(3, "cpu", "workers", 8.0), said.append) as watchdog:
        slow = Slow.remote(watchdog.heartbeat)
        assert list(watchdog.results(ray_cluster.get(one) for one in [slow.ready.remote()])) == [True]
        used = usage.usage("CPU")
        assert usage.told(used) == "3 are in use by this job"
        ray_cluster.kill(slow)
    assert said == []


def test_nodes_that_are_missing_while_a_stage_runs_are_told_and_then_that_workers_start(monkeypatch, ray_cluster):
    answers = iter([4, 1, 1, 4])
    monkeypatch.setattr("jobs.runtime.resources.number", lambda kind: next(answers))
    said = []
    resources = Resources(2, "cpu", "probes.workers", 60.0)
    resources.wait(said.append)
    assert said == []
    resources.wait(said.append)
    told = "probes.workers asks for 2 workers, but the cluster has 1 CPU, of which 0 can be used by workers"
    assert said == [f"waiting for nodes: {told}", "starting workers"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tasks, "_LOOK_EVERY", 0.5)


def _calls(ray, seconds, count=1):
    @ray.remote(num_cpus=1, max_retries=0)
    def task(begun):
        import time

        begun.set.remote()
        time.sleep(seconds)
        return "result"

    return [task.remote] * count


def test_tasks_tell_who_has_what_they_wait_for(quick, hold, ray_cluster):
    listener = _Listener(hold(4))
    results = task_results(_calls(ray_cluster, 0), Resources(1, "cpu", "detection.workers", 60.0), listener.tell)
    assert list(results) == ["result"]
    assert re.fullmatch(TOLD, listener.said[0])


def test_tasks_wait_for_other_jobs_no_longer_than_the_limit(quick, hold, ray_cluster):
    hold(4)
    resources = Resources(1, "cpu", "detection.workers", 60.0, 1.0)
    with pytest.raises(UserError, match=f"^{ENDED.format('detection.workers', 2)}$"):
        list(task_results(_calls(ray_cluster, 0), resources, lambda sentence: None))


def test_tasks_that_run_wait_for_nobody(quick, ray_cluster):
    said = []
    resources = Resources(1, "cpu", "detection.workers", 60.0, 0.0)
    assert list(task_results(_calls(ray_cluster, 3, 4), resources, said.append)) == ["result"] * 4
    assert said == []


def test_the_first_batches_of_a_calibration_tell_what_they_wait_for(hold, ray_cluster, tmp_path, teacher_folder):
    from tests.jobs.stages.test_calibration import config, run

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green star\n")
    listener = _Listener(hold(4))
    made = config(teacher_folder, prompts).model_copy(update={"worker_timeout_s": 20.0})
    run(made, tmp_path / "job", listener)
    assert re.fullmatch(TOLD, listener.said[0])
