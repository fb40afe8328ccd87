"""The plans that become variants."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ppcl.config.loading import Section
from ppcl.config.sections.fields import PlanItem, Share


class Target(Section):
    """Limits of a variant; ppcl chooses the plan of the smallest velocity error that meets them."""

    parameters: Share | None = Field(None, description="largest share of the transformer's parameters")
    speedup: float | None = Field(
        None,
        gt=1,
        description="smallest speed-up of a step over the teacher, measured on the job's devices with a "
        "batch of evaluation",
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Target:
        if self.parameters is None and self.speedup is None:
            raise ValueError("a target asks for parameters, for speedup or for both")
        return self


class Variants(Section):
    """Named variants of the result."""

    budgets: list[Share] = Field(
        [0.9, 0.8, 0.7], description="shares of the transformer's parameters, one variant each"
    )
    blocks: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="numbers of remaining blocks, one variant each, made of intervals alone",
    )
    targets: dict[str, Target] = Field(
        default_factory=dict,
        description="name: {parameters: largest share, speedup: smallest speed-up over the teacher}, one or both",
    )
    custom: dict[str, list[PlanItem]] = Field(
        default_factory=dict,
        description="name: list of replacements: intervals [u, v], blocks from 0, inclusive; text runs 'text:u-v'; "
        "FFNs 'ffn:u' (linear) or 'ffn:u/50' (half of the hidden units); heads 'heads:u/50' (half of them); "
        "'modulations'",
    )
