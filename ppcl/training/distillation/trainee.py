"""A replacement in training: an objective, and the training state that its checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.storage.tensor_files import load_tensors, save_tensors
from ppcl.training.captured import CapturedActivations
from ppcl.training.distillation.objectives import GradientObjective
from ppcl.training.losses import LOSSES
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.train_state import TrainState


class Trainee:
    """Optimizer, EMA and checkpoint state of one replacement in training.

    It trains on the teacher's own streams, so no gradient and no error comes from another replacement.
    """

    def __init__(self, objective: GradientObjective, settings: Distillation, dims: ParallelDims):
        self.objective = objective
        self.module = objective.module.float().requires_grad_(True).train()
        self.loss = LOSSES[settings.loss]
        self.state = TrainState(dict(self.module.named_parameters()), settings, dims)

    def train_step(self, captured: CapturedActivations, bfloat16: bool) -> dict[str, float]:
        """One optimizer step on the teacher's activations of a batch; returns the loss and each of its terms."""
        device = next(iter(self.state.parameters.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            terms = self.objective.losses(captured, self.loss)
        return self.state.train_step(terms)

    def export(self) -> nn.Module:
        """The trained module, with the averaged parameters if an average is kept."""
        self.state.use_ema()
        return self.module

    def save(self, path: Path) -> None:
        """Write a checkpoint: whole, or not at all."""
        save_tensors(path, *self.state.state_dict())

    def load(self, path: Path) -> None:
        """Resume from a checkpoint. Raises `DamagedError`."""
        self.state.load_state_dict(*load_tensors(path))
