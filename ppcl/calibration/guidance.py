"""Classifier-free guidance as the pipelines' samplers apply it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from ppcl.calibration.encoding import negative_prompt
from ppcl.config.schema import Sampling
from ppcl.models import ModelAdapter


@dataclass(frozen=True)
class Guidance:
    """The velocity that a sampler follows, from both sides of guidance: `u + scale (c - u)`.

    `keeps_norm`: it then gets the norm of the conditional one, token by token, as in Qwen-Image's pipeline.
    """

    scale: float
    keeps_norm: bool

    @classmethod
    def of(cls, adapter: ModelAdapter, pipeline: str, sampling: Sampling) -> Guidance | None:
        """That of a pipeline's class with the arguments of the sampling; None where it makes one call a step.

        SD3's skip-layer guidance is not part of it.
        """
        import diffusers

        pipeline_class = getattr(diffusers, pipeline)
        argument = adapter.guidance_argument
        default = inspect.signature(pipeline_class.__call__).parameters[argument].default
        scale = sampling.arguments.get(argument, default) or 0
        if scale <= 1 or negative_prompt(pipeline_class, sampling) is None:
            return None
        return cls(float(scale), adapter.guidance_keeps_norm)

    def __call__(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """`(B, …)` each; the velocity to follow, of the same shape."""
        combined = unconditional + self.scale * (conditional - unconditional)
        if not self.keeps_norm:
            return combined
        return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
