"""The state of parameters in training, and one optimizer step on it: what distillation and fine-tuning share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ppcl.training.losses import LossTerm
from ppcl.training.optim import RateSettings, learning_rate
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.sharding import local, whole

# The least share of the target's energy that a loss is divided by where its logarithm is taken.
_LEAST_SHARE = 1e-12
_MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerSettings(RateSettings, Protocol):
    """The part of a configuration section that makes an optimizer."""

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def gradient_clip(self) -> float: ...

    @property
    def ema(self) -> float: ...


class TrainState:
    """Parameters in training with their AdamW optimizer, EMA, step, skipped steps and loss history.

    Parameters are float32 and live on one device; `dims` says over which replicas gradients are summed. With `ema` 0 no
    average is kept. `loss_history`: one dict a recorded step, with `step`, `loss` and the terms.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings, dims: ParallelDims):
        self.parameters, self.settings, self.dims = dict(parameters), settings, dims
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters.values())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self.step, self.skipped_steps = 0, 0
        self.loss_history: list[dict[str, float]] = []

    def train_step(self, terms: Mapping[str, LossTerm], logarithm: bool = False) -> dict[str, float]:
        """One optimizer step on loss terms that add up; gives `loss` and every term, over all replicas.

        A term is a sum over this replica's tokens and its divisor; both are summed over the replicas before the
        division, so splitting a batch does not change the loss. `logarithm`: take the gradient of the loss's logarithm.

        A step whose gradient is not finite is left out and counted: one bad batch must not end a run. Losses stay on
        the device: one reduction of them, one of the gradients, and one transfer to the host.
        """
        sums = torch.stack([term_sum for term_sum, _ in terms.values()])
        divisors = torch.stack([divisor.to(sums) for _, divisor in terms.values()])
        totals = self.dims.all_reduce(torch.stack([sums.detach(), divisors]).double())
        weights = torch.maximum(totals[0], _LEAST_SHARE * totals[1]) if logarithm else totals[1]
        # In the terms' own order and precision, one by one: a different order of additions would round differently.
        loss = reduce(torch.add, (sums[i] / weights[i].to(sums) for i in range(len(terms))))
        self.optimizer.zero_grad(set_to_none=True)
        # FSDP takes the mean over the replicas, each of which has its part of the sum.
        torch.autograd.backward(loss * self.dims.dp if self.sharded else loss)
        if not self.sharded:
            self._reduce_gradients()
        trained = [p for p in self.parameters.values() if p.grad is not None]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.settings.gradient_clip))
        *values, norm_value = torch.cat([totals[0] / totals[1], norm.double().reshape(1)]).tolist()
        if norm_value - norm_value == 0:  # neither infinite nor NaN
            self._update()
        else:
            self.skipped_steps += 1
        self.step += 1
        return {"loss": sum(values)} | dict(zip(terms, values, strict=True))

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.optimizer.step()
        if self.ema:
            weight = 1 - min(self.settings.ema, (self.step + 1) / (self.step + 10))
            averages = [local(value) for value in self.ema.values()]
            torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], weight)

    def _reduce_gradients(self) -> None:
        """Sum the gradients over the replicas, in one message."""
        if self.dims.dp == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = self.dims.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def use_ema(self) -> None:
        """Set the parameters to their averages, where averages are kept."""
        for name, value in self.ema.items():
            local(self.parameters[name]).copy_(local(value))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained and what belongs to each parameter of it, by name: sharded as the parameters are."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.parameters.items():
            if state := self.optimizer.state.get(parameter):
                tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
        return tensors

    def rest(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What else a stopped run needs, the same on all replicas: how often each parameter was updated, and metadata.

        The counts are scalars on the host, `step.<parameter>`; one that was never updated has none.
        """
        states = {name: self.optimizer.state.get(parameter) for name, parameter in self.parameters.items()}
        counts = {f"step.{name}": state["step"].cpu() for name, state in states.items() if state}
        metadata = {
            "step": str(self.step),
            "skipped_steps": str(self.skipped_steps),
            "loss_history": json.dumps(self.loss_history),
        }
        return counts, metadata

    def restart(self, counts: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Continue from what `rest` gave; gives the tensors that are still to be filled, those of `tensors`."""
        self.step, self.skipped_steps = int(metadata["step"]), int(metadata["skipped_steps"])
        self.loss_history = json.loads(metadata["loss_history"])
        for name, parameter in self.parameters.items():
            if f"step.{name}" in counts:
                state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
                # The count stays on the host, as AdamW keeps it.
                self.optimizer.state[parameter] = {"step": counts[f"step.{name}"].clone(), **state}
        return self.tensors()

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Everything that a stopped run needs to continue, where nothing is sharded."""
        counts, metadata = self.rest()
        return self.tensors() | counts, metadata

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Continue from what `state_dict` gave."""
        for name, tensor in self.restart(tensors, metadata).items():
            tensor.copy_(tensors[name])

    def record(self, losses: Mapping[str, float], every: int) -> None:
        """Keep the last step's losses in the history: one step in `every`, and the last of all."""
        step = self.step - 1
        if step % every == 0 or self.step == self.settings.steps:
            self.loss_history.append({"step": step, **{name: float(f"{value:.6g}") for name, value in losses.items()}})
