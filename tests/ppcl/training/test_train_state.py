"""One optimizer step, its average and its checkpoint, against AdamW written out."""

import numpy as np
import pytest
import torch

from ppcl.config.schema import Distillation
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.train_state import TrainState

STEPS = 6
SETTINGS = Distillation(
    steps=STEPS, warmup=2, learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.05, gradient_clip=0.5, ema=0.7
)
TARGET = torch.linspace(-1, 1, 6).reshape(2, 3)


def new_state(settings=SETTINGS):
    return TrainState({"w": torch.nn.Parameter(torch.full((2, 3), 0.5))}, settings, ParallelDims())


def terms(state, scale=1.0):
    """Half of a squared distance, as a sum over 12 tokens and their number."""
    distance = (state.parameters["w"] - TARGET).square().sum()
    return {"img": (6 * scale * distance, torch.tensor(12.0))}


def by_hand(steps):
    """`(w, ema)` after some steps: clipped gradients, AdamW with decoupled decay, and an average that warms up."""
    w, target = np.full((2, 3), 0.5), TARGET.double().numpy()
    first, second, ema = np.zeros_like(w), np.zeros_like(w), w.copy()
    for step in range(steps):
        warm, done = (step + 1) / 2, (step - 2) / (STEPS - 2)
        rate = 0.1 * (warm if step < 2 else 0.5 * (1 + np.cos(np.pi * done)))
        gradient = w - target
        gradient *= min(1, 0.5 / np.linalg.norm(gradient))
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        mean, square = first / (1 - 0.8 ** (step + 1)), second / (1 - 0.9 ** (step + 1))
        w = w * (1 - rate * 0.05) - rate * mean / (np.sqrt(square) + 1e-8)
        decay = min(0.7, (step + 1) / (step + 10))
        ema = decay * ema + (1 - decay) * w
    return w, ema


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def test_steps_are_those_of_adamw_written_out():
    state = new_state()
    for step in range(STEPS):
        expected = ((state.parameters["w"] - TARGET).square().sum() / 2).item()
        assert state.train_step(terms(state)) == pytest.approx({"loss": expected, "img": expected})
        w, ema = by_hand(step + 1)
        np.testing.assert_allclose(state.parameters["w"].detach().numpy(), w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.ema["w"].numpy(), ema, rtol=1e-5, atol=1e-6)
    state.use_ema()
    assert torch.equal(state.parameters["w"], state.ema["w"])


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted():
    state = new_state()
    state.train_step(terms(state))
    before = state.parameters["w"].detach().clone(), state.ema["w"].clone()
    state.train_step(terms(state, scale=float("nan")))
    assert (state.step, state.skipped_steps) == (2, 1)
    assert torch.equal(state.parameters["w"], before[0]) and torch.equal(state.ema["w"], before[1])


def test_training_goes_on_from_a_state_dict_as_if_it_had_not_stopped():
    whole, stopped, resumed = new_state(), new_state(), new_state()
    for state, steps in ((whole, STEPS), (stopped, 3)):
        for _ in range(steps):
            state.record(state.train_step(terms(state)), every=2)
    tensors, metadata = stopped.state_dict()
    resumed.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, metadata)
    for _ in range(3):
        resumed.record(resumed.train_step(terms(resumed)), every=2)
    assert torch.equal(resumed.parameters["w"], whole.parameters["w"])
    assert torch.equal(resumed.ema["w"], whole.ema["w"])
    assert resumed.step == STEPS and resumed.loss_history == whole.loss_history
    assert [point["step"] for point in whole.loss_history] == [0, 2, 4, 5]


def test_the_gradient_of_a_loss_s_logarithm_is_that_of_the_loss_over_the_loss():
    settings = SETTINGS.model_copy(update={"gradient_clip": 1e9})
    plain, logarithm = new_state(settings), new_state(settings)
    loss = plain.train_step(terms(plain))["loss"]
    logarithm.train_step(terms(logarithm), logarithm=True)
    expected = plain.parameters["w"].grad / loss
    torch.testing.assert_close(logarithm.parameters["w"].grad, expected)
