"""Resources of a cluster that has none at first, where Ray's own autoscaler adds nodes."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest

from jobs.runtime.resources import Resources, refuse_impossible, shortfall
from ppcl.config.schema import Config
from ppcl.errors import UserError
from tests.autoscaling import autoscaling


def _join(address):
    import ray

    ray.init(address=address, log_to_driver=False)


@pytest.fixture(scope="module")
def there():
    """`there(function, ...)` calls it in a process on a cluster with nothing but its head.

    To it may come two nodes of two CPUs and one with what Ray takes for a GPU. (This process has the Ray of the other
    tests.)
    """
    spawn = multiprocessing.get_context("spawn")
    types = {"cpu": ({"CPU": 2}, 2), "gpu": ({"CPU": 1, "GPU": 1}, 1)}
    with autoscaling(**types) as address, ProcessPoolExecutor(1, spawn, _join, (address,)) as pool:
        yield lambda *call: pool.submit(*call).result(240)


def _launched():
    from jobs.runtime import autoscaler
    from jobs.runtime.cluster import number

    return autoscaler.launching() or number("CPU") > 0


def _waited_for(workers, worker_timeout_s):
    """The CPUs after the waiting, and the states of the placement groups that asked."""
    import ray

    from jobs.runtime.cluster import number

    refuse_impossible([(workers, "probes.workers")], "cpu")
    assert shortfall(workers, "cpu", "probes.workers")
    Resources(workers, "cpu", "probes.workers", worker_timeout_s).wait(lambda sentence: None)
    return number("CPU"), {group["state"] for group in ray.util.placement_group_table().values()}


def _wait(*asked):
    Resources(*asked).wait(lambda sentence: None)


def _device(device):
    from jobs.runtime.cluster import device_of

    return device_of(Config(teacher="teacher", prompts="prompts.txt", device=device))


def test_what_the_autoscaler_can_never_add_is_refused_at_once_and_brings_no_node(there):
    told = (
        "probes.workers asks for 9 workers, but the cluster has 0 CPUs, of which 0 can be used by workers, and its "
        "autoscaler cannot bring it to 10 CPUs; ask for fewer or raise what it may add"
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        there(refuse_impossible, [(1, "calibration.workers"), (9, "probes.workers"), (3, "evaluation.workers")], "cpu")
    assert not there(_launched)


def test_places_come_when_they_are_waited_for_and_are_asked_for_no_longer(there):
    cpus, groups = there(_waited_for, 2, 120.0)
    assert cpus >= 3 and groups == {"REMOVED"}


def test_the_device_is_a_gpu_where_the_autoscaler_can_add_one(there):
    assert there(_device, "cpu") == "cpu"
    assert there(_device, "auto") == there(_device, "cuda") == "cuda"


def test_places_that_nobody_adds_are_told_after_the_patience(there):
    told = (
        r"finetuning.data_parallel asks for 5 workers, but the cluster has \d GPUs?, of which \d can be used by "
        r"workers; ask for fewer or add nodes"
    )
    with pytest.raises(UserError, match=told):
        there(_wait, 5, "cuda", "finetuning.data_parallel", 1.0)
