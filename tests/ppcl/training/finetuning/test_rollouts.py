"""The sampling trajectories that fine-tuning takes states from."""

import numpy as np
import pytest
import torch

from ppcl.calibration.schedules import Schedule
from ppcl.training.finetuning.rollouts import Rollouts


def test_a_trajectory_moves_on_by_euler_steps_and_begins_again_from_noise_at_its_end():
    schedule = Schedule.of_timesteps(np.linspace(0.1, 1.0, 10), 10)
    assert schedule.timesteps == pytest.approx(np.linspace(1.0, 0.1, 10))
    assert schedule.sigmas == pytest.approx(np.linspace(1.0, 0.0, 11))
    x, rng = torch.randn(3, 40, 50), np.random.default_rng(0)
    own = Rollouts([7, 8, 9], [1.0, 0.1, 0.5], x, schedule, np.array([3]))
    v = torch.randn(3, 40, 50)
    v[2, 0, 0] = torch.nan
    own.advance(np.array([0, 1, 2]), v, rng)
    assert own.ids.tolist() == [7, 3, 3] and own.timesteps == pytest.approx([0.9, 1.0, 1.0])
    assert torch.allclose(own.latents[0], x[0] - 0.1 * v[0])
    noise = own.latents[1:].clone()
    assert noise.std().item() == pytest.approx(1, abs=0.05) and noise.mean().item() == pytest.approx(0, abs=0.05)
    assert not torch.equal(noise[0], noise[1])
    own.advance(np.array([2]), v[:1], rng)
    assert own.timesteps == pytest.approx([0.9, 1.0, 0.9]) and torch.equal(own.latents[1], noise[0])
    other = Rollouts([0, 0, 0], [1.0, 1.0, 1.0], torch.zeros(3, 40, 50), schedule, np.array([3]))
    other.restore(own.tensors())
    assert (other.ids.tolist(), other.timesteps.tolist()) == (own.ids.tolist(), own.timesteps.tolist())
    assert torch.equal(other.latents, own.latents)


def test_a_trajectory_reaches_its_end_in_as_many_steps_as_there_are_timesteps():
    schedule = Schedule.of_timesteps(np.linspace(0.05, 1.0, 20), 20)
    own = Rollouts([7], [1.0], torch.zeros(1, 2), schedule, np.array([3]))
    for _ in range(19):
        own.advance(np.array([0]), torch.ones(1, 2), np.random.default_rng(0))
    assert own.ids[0] == 7 and torch.allclose(own.latents, torch.tensor(0.05 - 1.0))
    own.advance(np.array([0]), torch.ones(1, 2), np.random.default_rng(0))
    assert own.ids[0] == 3 and own.timesteps[0] == 1.0
