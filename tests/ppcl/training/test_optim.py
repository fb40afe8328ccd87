"""The learning rate, against PyTorch's own schedulers."""

import pytest
import torch

from ppcl.config.schema import Distillation
from ppcl.training.optim import learning_rate


@pytest.mark.parametrize(("steps", "warmup"), [(50, 10), (50, 1), (7, 5)])
def test_the_rate_is_a_linear_warm_up_and_then_a_cosine_to_zero(steps, warmup):
    settings = Distillation(steps=steps, warmup=warmup, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [warmup])
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [learning_rate(step, settings) for step in range(steps)] == pytest.approx(expected)


def test_without_a_warm_up_the_first_step_has_the_whole_rate():
    assert learning_rate(0, Distillation(steps=10, warmup=0, learning_rate=0.3)) == pytest.approx(0.3)
