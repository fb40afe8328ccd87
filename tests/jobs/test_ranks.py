"""Worker groups that cannot start, and what they leave."""

import time

import pytest
import torch
from ray.train.torch import TorchConfig
from safetensors.torch import save_file

from jobs import ranks
from jobs.group import GroupConfig, _Backend
from jobs.ranks import Places, drop_damaged, run_ranks


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
        run_ranks("test", lambda arguments, report: None, {}, Places(2, "cpu", "workers", 1.0), tmp_path / "ray", lambda *told: None)
    assert _groups(job)
    deadline = time.monotonic() + 60
    while set(_groups(job)) != {"REMOVED"}:
        assert time.monotonic() < deadline, _groups(job)
        time.sleep(0.2)


def test_the_group_is_torchs_own_with_its_settings():
    config = GroupConfig(backend="gloo", timeout_s=7)
    assert isinstance(config, TorchConfig) and config.to_dict() == TorchConfig(backend="gloo", timeout_s=7).to_dict()


def test_checkpoints_that_cannot_be_read_are_dropped_and_the_others_kept(tmp_path):
    for name in ("00-01", "02-03", "04-05"):
        save_file({"x": torch.arange(1000.0)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "02-03.safetensors").write_bytes((tmp_path / "02-03.safetensors").read_bytes()[:-1])
    (tmp_path / "04-05.safetensors").write_bytes(b"")
    assert drop_damaged(tmp_path) == ["02-03", "04-05"]
    assert [path.stem for path in tmp_path.iterdir()] == ["00-01"] and drop_damaged(tmp_path) == []
