"""Distillation of each replacement, and fine-tuning of what variants put together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ppcl.config.loading import Section
from ppcl.config.sections.fields import OPERATIONAL, Decay, Replicas


class Distillation(Section):
    """Distillation of depth and width replacements in one phase, non-sequential and segment-parallel (Eq. 6 to 9)."""

    renamed: ClassVar[dict[str, str]] = {
        "start": "init",
        "student_hidden": "student_keep_percent",
        "pipeline": "pipeline_parallel",
        "replicas": "data_parallel",
    }

    steps: int = Field(6000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="samples per step over all data-parallel ranks")
    learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW; the schedule is a cosine to zero"
    )
    warmup: int = Field(100, ge=0, description="steps of linear learning-rate warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (default: the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (default: the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm of each replacement")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the parameters; 0: off")
    loss: Literal["relative", "normalized"] = Field(
        "relative",
        description="relative: squared error over the target's energy, which keeps magnitudes; normalized: Eq. 6",
    )
    train: Literal["students", "all"] = Field(
        "students",
        description="students: student blocks are trained by gradient, linear maps stay at their least-squares optimum"
        "; all: linear maps are trained too (the paper)",
    )
    init: Literal["affine", "first", "middle"] = Field(
        "affine",
        description="initialization of a student block: affine: block u followed by the closed-form affine map; first: "
        "block u "
        "(the paper); middle: the middle block (the reference code)",
    )
    student_keep_percent: int = Field(
        100,
        ge=1,
        le=100,
        description="percent of the hidden units that the students' FFNs keep, chosen by least squares; 100: all (the "
        "paper)",
    )
    ridge: float = Field(
        1e-4, ge=0, description="ridge regularization of the closed-form maps, as a share of a channel's variance"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    moments_gb: float = Field(
        16.0,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory of a rank, in GB, for the sums that closed-form maps are computed from; more take "
        "several passes over the samples",
    )
    pipeline_parallel: int = Field(
        1,
        json_schema_extra=OPERATIONAL,
        ge=1,
        description="pipeline-parallel ranks; each holds a segment of the teacher's blocks",
    )
    data_parallel: Replicas = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="data-parallel replicas of the pipeline"
    )
    checkpoint_every: int = Field(500, json_schema_extra=OPERATIONAL, ge=1, description="steps between checkpoints")


class Finetuning(Section):
    """End-to-end fine-tuning of the replacements on the velocity; every step trains a random plan."""

    renamed: ClassVar[dict[str, str]] = {
        "own_states": "rollout_share",
        "recompute": "activation_checkpointing",
        "replicas": "data_parallel",
        "measured": "measured_plans",
    }

    steps: int = Field(0, ge=0, description="optimizer steps; 0: no fine-tuning; the paper: 1000")
    batch_size: int = Field(16, ge=1, description="samples per step over all data-parallel ranks")
    learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW; the schedule is a cosine to zero"
    )
    warmup: int = Field(50, ge=0, description="steps of linear learning-rate warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (default: the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (default: the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the parameters; 0: off")
    rollout_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a batch that comes from the variants' own trajectories (rollouts) instead of the "
        "teacher's",
    )
    plan: str = Field(
        "variants",
        description="plans to train: variants: a named variant or a part of one per step; any: any plan; the name of a "
        "variant, or a "
        "plan such as 3-5,ffn:7: this one alone",
    )
    train: Literal["replacements", "all"] = Field(
        "replacements",
        description="replacements: the teacher's own blocks stay as they are, and variants share them; all: those that "
        "stay in the one plan of finetuning.plan are trained with its replacements (the paper), for this plan alone",
    )
    variants: list[str] = Field(
        [], description="with plan: variants, the names of the variants to train, whole and in part; []: all"
    )
    feature_loss: bool = Field(
        False,
        description="also train on the error of the image stream behind every block, with as much weight as that of "
        "the velocity; keeps the teacher's streams of a step in memory",
    )
    activation_checkpointing: bool = Field(
        True,
        json_schema_extra=OPERATIONAL,
        description="recompute activations in the backward pass instead of keeping them; false is faster where they "
        "fit",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    data_parallel: Replicas = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="data-parallel ranks")
    shard: bool = Field(
        True,
        json_schema_extra=OPERATIONAL,
        description="shard the teacher, the replacements and the optimizer state over the ranks (FSDP2); false: each "
        "rank holds all, which is faster for small models",
    )
    measured_plans: int = Field(
        50,
        ge=0,
        description="random plans to measure before and after fine-tuning, in addition to the variants; they decide "
        "which other plans use the fine-tuned parameters",
    )
    checkpoint_every: int = Field(100, json_schema_extra=OPERATIONAL, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _trains_one_plan_in_full(self) -> Finetuning:
        if self.train == "all" and self.plan in ("variants", "any"):
            raise ValueError(
                f"train is all, but plan is {self.plan}; name the one variant or plan to train in full there"
            )
        return self
