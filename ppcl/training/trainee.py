"""A replacement in training: its optimizer, its average, its curve, and its checkpoint, keyed by the replacement alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ppcl.config.schema import Distillation
from ppcl.replacements.io import ReplacementModule
from ppcl.storage.tensor_files import load_tensors, save_tensors
from ppcl.training.captured import CapturedActivations
from ppcl.training.distillation.objectives import DistillationObjective
from ppcl.training.losses import LOSSES
from ppcl.training.optim import learning_rate
from ppcl.training.parallel_dims import ParallelDims


class Trainee:
    """Takes one objective on the teacher's own streams. No gradient and no error comes from any other."""

    def __init__(self, objective: DistillationObjective, settings: Distillation, dims: ParallelDims):
        self.objective = objective
        self.module = objective.module.float().requires_grad_(True).train()
        self.settings, self.dims = settings, dims
        self.parameters = dict(self.module.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()} if settings.ema else {}
        self.step = 0
        self.skipped = 0
        self.loss_history: list[dict[str, float]] = []

    def train_step(self, captured: CapturedActivations, bfloat16: bool) -> dict[str, float]:
        """One optimizer step on what a batch left of the teacher; gives the loss, whole and by part.

        A step whose gradient is not finite is left out and counted: one bad batch must not end a student.
        """
        device = next(iter(self.parameters.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            parts = self.objective.losses(captured, LOSSES[self.settings.loss])
        sums = {name: part[0] for name, part in parts.items()}
        divisors = {name: part[1] for name, part in parts.items()}
        total = self.dims.all_reduce(torch.tensor(list(divisors.values()), dtype=torch.float64))
        loss = sum(s / n for s, n in zip(sums.values(), total.tolist(), strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._reduce_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings)
            self.optimizer.step()
            if self.ema:
                weight = 1 - min(self.settings.ema, (self.step + 1) / (self.step + 10))
                torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        else:
            self.skipped += 1
        self.step += 1
        parts = torch.stack([s.detach().double().cpu() for s in sums.values()]) / total
        parts = self.dims.all_reduce(parts).tolist()
        return {"loss": sum(parts)} | dict(zip(sums, parts))

    def _reduce_gradients(self) -> None:
        if self.dims.dp == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        # One message a student instead of one a parameter.
        flat = self.dims.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))

    def export(self) -> ReplacementModule:
        """What to keep: the average where one is kept."""
        if self.ema:
            with torch.no_grad():
                for k, p in self.parameters.items():
                    p.copy_(self.ema[k])
        return self.module

    def save(self, path: Path) -> None:
        """Everything needed to go on."""
        tensors = {f"student.{k}": p for k, p in self.parameters.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, p in self.parameters.items():
            state = self.optimizer.state.get(p)
            if state:
                tensors |= {f"exp_avg.{k}": state["exp_avg"], f"exp_avg_sq.{k}": state["exp_avg_sq"]}
        metadata = {"step": str(self.step), "skipped": str(self.skipped), "curve": json.dumps(self.loss_history)}
        metadata["updates"] = str(self.step - self.skipped)
        save_tensors(path, tensors, metadata)

    def load(self, path: Path) -> None:
        tensors, metadata = load_tensors(path)
        self.step, self.skipped = int(metadata["step"]), int(metadata["skipped"])
        self.loss_history = json.loads(metadata["curve"])
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(tensors[f"student.{k}"])
                if self.ema:
                    self.ema[k].copy_(tensors[f"ema.{k}"])
                if f"exp_avg.{k}" in tensors:
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(metadata["updates"])),
                        "exp_avg": tensors[f"exp_avg.{k}"].to(p.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{k}"].to(p.device),
                    }
