"""Actors that stop, are gone, or have no place: real processes."""

import os
import signal
import time

import pytest

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Watchdog
from ppcl.errors import UserError

PATIENCE = 6.0


@pytest.fixture
def watchdog(ray_cluster):
    with Watchdog("a worker", Resources(1, "cpu", "workers", PATIENCE), lambda sentence: None) as watchdog:
        yield watchdog


def worker(ray, heartbeat, stops=None):
    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self):
            heartbeat.start()
            self.stop_in("constructor")

        def stop_in(self, where):
            if where == stops:
                os.kill(os.getpid(), signal.SIGSTOP)

        def work(self, seconds=0.0):
            self.stop_in("work")
            time.sleep(seconds)
            return os.getpid()

    return Worker.remote()


def made(ray, *actors, seconds=0.0):
    """Asked at once, and waited for."""
    asked = [actor.work.remote(seconds) for actor in actors]
    return (ray.get(one) for one in asked)


def test_an_actor_that_is_stopped_is_killed_and_told(ray_cluster):
    told = (
        rf"a worker \(process \d+ on [\d.]+\) sent no heartbeat for {PATIENCE:.0f} s, "
        "the configuration's worker_timeout_s"
    )
    with (
        pytest.raises(RuntimeError, match=told),
        Watchdog("a worker", Resources(1, "cpu", "workers", PATIENCE), lambda sentence: None) as watchdog,
    ):
        list(watchdog.results(made(ray_cluster, worker(ray_cluster, watchdog.heartbeat, "constructor"))))


def test_the_others_go_on(ray_cluster, watchdog):
    stopped, well = worker(ray_cluster, watchdog.heartbeat, "work"), worker(ray_cluster, watchdog.heartbeat)
    coming = watchdog.results(made(ray_cluster, well, stopped))
    assert next(coming) > 0
    with pytest.raises(ray_cluster.exceptions.ActorDiedError):
        next(coming)
    assert len(watchdog.killed) == 1
    assert len(list(watchdog.results(made(ray_cluster, well)))) == 1


def test_one_that_works_for_longer_than_the_patience_is_left_alone_and_one_that_is_gone_is_not_told(
    ray_cluster, watchdog
):
    gone, well = worker(ray_cluster, watchdog.heartbeat), worker(ray_cluster, watchdog.heartbeat)
    list(watchdog.results(made(ray_cluster, gone)))
    ray_cluster.kill(gone)
    assert list(watchdog.results(made(ray_cluster, well, seconds=1.5 * PATIENCE)))
    assert not watchdog.killed


def test_a_users_mistake_stays_what_it_is(ray_cluster):
    with (
        pytest.raises(UserError, match="mistake"),
        Watchdog("a worker", Resources(1, "cpu", "workers", PATIENCE), lambda sentence: None) as watchdog,
    ):
        watchdog.killed.append("a worker sent no heartbeat")
        raise UserError("mistake")


def test_places_that_are_gone_end_the_waiting(ray_cluster):
    told = "workers asks for 99 workers, but the cluster has 4 CPUs, of which 3 can be used by workers"
    with (
        pytest.raises(UserError, match=told),
        Watchdog("a worker", Resources(99, "cpu", "workers", 2.0), lambda sentence: None) as watchdog,
    ):
        list(watchdog.results(made(ray_cluster, worker(ray_cluster, watchdog.heartbeat), seconds=60)))
