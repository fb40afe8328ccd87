"""The states of a step where the sampler is guided: both sides of each rollout, moved on by the guided velocity."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ppcl.calibration.guidance import Guidance
from ppcl.calibration.schedules import Schedule
from ppcl.config.schema import Finetuning
from ppcl.models import adapter_of
from ppcl.training.finetuning.state_batches import Sampler, StateBatches, conditional_ids
from ppcl.training.run_context import RunContext

# What a transformer is given is rounded, what the sampler moves by is not.
SCHEDULE = Schedule(np.array([1.0, 0.75, 0.5, 0.25]), np.array([1.0, 0.76, 0.51, 0.24, 0.0]))
GUIDANCE = Guidance(scale=3.0, keeps_norm=True)
# Sample 5 is missing: its state was not finite.
IDS = np.array([0, 1, 2, 3, 4, 6, 7])


class TwoSided:
    """Samples of both sides of guidance, whose embedding says which side it is of."""

    def ids(self, split):
        return IDS

    def batch(self, ids, device="cpu", dtype=torch.float32):
        ids = np.asarray(ids)
        return {
            "hidden_states": torch.zeros(len(ids), 4, 8, dtype=dtype),
            "timestep": torch.full((len(ids),), 0.5),
            "encoder_hidden_states": torch.from_numpy(ids).to(dtype)[:, None],
        }


@pytest.fixture
def batches(tmp_path):
    settings = Finetuning(batch_size=8, rollout_share=0.5)
    adapter = adapter_of("QwenImageTransformer2DModel")
    sampler = Sampler(FlowMatchEulerDiscreteScheduler(), SCHEDULE, 4)
    return StateBatches(TwoSided(), adapter, settings, sampler, RunContext(tmp_path, tmp_path), GUIDANCE)


def test_rollouts_are_of_prompts_whose_both_sides_are_there():
    assert conditional_ids(IDS).tolist() == [0, 2, 6]


def test_a_batch_has_both_sides_of_a_rollout_at_the_same_state(batches):
    rollouts = batches.rollouts
    rollouts.latents = torch.randn(rollouts.latents.shape)
    rollouts.timesteps = np.linspace(0.2, 0.9, len(rollouts))
    batch = batches.draw(0, np.random.default_rng(0))
    assert len(batch.places) == 2 and len(batch.inputs["timestep"]) == 8
    own = batch.inputs["encoder_hidden_states"][-4:, 0].int().tolist()
    prompts = rollouts.ids[batch.places].tolist()
    assert own == [*prompts, *(prompt + 1 for prompt in prompts)] and set(prompts) <= {0, 2, 6}
    for rows in (batch.inputs["hidden_states"][-4:-2], batch.inputs["hidden_states"][-2:]):
        assert torch.equal(rows, rollouts.latents[batch.places])
    shares = torch.from_numpy(rollouts.timesteps[batch.places]).float()
    assert torch.equal(batch.inputs["timestep"][-4:], shares.repeat(2))
    assert (batch.inputs["timestep"][:4] == 0.5).all()


def test_a_rollout_follows_the_guided_velocity(batches):
    rollouts = batches.rollouts
    batch = batches.draw(0, np.random.default_rng(0))
    velocity = torch.randn(8, 4, 8)
    before = rollouts.latents[batch.places].clone()
    batches.advance(batch, velocity, np.random.default_rng(0))
    moved = before + (0.24 - 0.51) * GUIDANCE(velocity[-4:-2], velocity[-2:])
    assert torch.allclose(rollouts.latents[batch.places], moved)
    assert (rollouts.timesteps[batch.places] == 0.25).all()
