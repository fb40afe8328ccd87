"""Worker groups that cannot start, and what they leave."""

import threading
import time

import pytest
from ray.train.torch import TorchConfig

from jobs.runtime import worker_group as ranks
from jobs.runtime.process_group import GroupConfig, _Backend
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import run_worker_group
from ppcl.errors import UserError


class _Fails(_Backend):
    def on_start(self, worker_group, backend_config):
        raise RuntimeError("no process group today")


class _Config(GroupConfig):
    @property
    def backend_cls(self):
        return _Fails


def _groups(job):
    from ray.util.placement_group import placement_group_table

    return [group["state"] for identity, group in placement_group_table().items() if identity.endswith(job)]


def test_a_worker_group_that_fails_while_it_starts_leaves_no_place_taken(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "GroupConfig", _Config)
    job = ray_cluster.get_runtime_context().get_job_id()
    with pytest.raises(Exception, match="no process group today"):
        run_worker_group(
            "test",
            lambda arguments, report: None,
            {},
            Resources(2, "cpu", "workers", 1.0),
            tmp_path / "ray",
            lambda *told: None,
        )
    assert _groups(job)
    deadline = time.monotonic() + 60
    while set(_groups(job)) != {"REMOVED"}:
        assert time.monotonic() < deadline, _groups(job)
        time.sleep(0.2)


def test_the_group_is_torchs_own_with_its_settings():
    config = GroupConfig(backend="gloo", timeout_s=7)
    assert isinstance(config, TorchConfig) and config.to_dict() == TorchConfig(backend="gloo", timeout_s=7).to_dict()


class _Taken:
    """Resources that another job was faster to take, and that stay in use."""

    def __init__(self):
        self.answers = iter([None, "waiting for 4 GPUs; 8 exist, 6 are in use by tasks"])

    def waits_for(self):
        for answer in self.answers:
            return answer
        raise UserError("waited 3600 s for them")


def test_ranks_that_wait_for_what_another_job_has_taken_say_so_and_do_not_wait_for_ever(ray_cluster, monkeypatch):
    monkeypatch.setattr(ranks, "_LOOK_EVERY", 0.0)
    over, said = threading.Event(), []
    training = threading.Thread(target=over.wait, args=(120,))
    training.start()
    try:
        with pytest.raises(UserError, match="waited 3600 s for them"):
            ranks._follow(training, ranks._ProgressActor.remote(), _Taken(), lambda *told, phase: said.append(phase))
    finally:
        over.set()
        training.join()
    assert said == ["waiting for 4 GPUs; 8 exist, 6 are in use by tasks"]
