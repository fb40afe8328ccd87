"""What is measured of variants, and the ablation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ppcl.config.loading import Section
from ppcl.config.location import Location
from ppcl.config.sections.fields import OPERATIONAL


class ScorerSettings(Section):
    """One scorer of images: under its name in `evaluation.scorers`."""

    call: str = Field(
        ...,
        description="clip_score, pick_score, image_reward, hpsv2, hpsv3, lpips, dists, psnr, ssim, ocr, or "
        "module:function of your own",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="its arguments, such as model: the path of its weights"
    )
    suites: list[str] | None = Field(
        None, description="names of the suites that it scores; prompts: evaluation.prompts or its stand-in; null: all"
    )
    higher_is_better: bool = Field(True, description="false: for distances, such as lpips and dists")
    batch_size: int = Field(16, json_schema_extra=OPERATIONAL, ge=1, description="images of a call")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that score images")
    cpus: float = Field(1, json_schema_extra=OPERATIONAL, ge=0, description="CPUs of a worker")
    gpus: float = Field(
        0, json_schema_extra=OPERATIONAL, ge=0, description="GPUs of a worker, or a share of one; 0: it runs on the CPU"
    )
    runtime_env: dict[str, Any] | None = Field(
        None,
        json_schema_extra=OPERATIONAL,
        description="Ray's runtime environment of its workers, such as {pip: [diffsynth]}; null: that of the job",
    )


class Evaluation(Section):
    """Measurements of every variant: velocity errors, image similarity, scores of a prompt checker and of scorers."""

    renamed: ClassVar[dict[str, str]] = {"world": "checker", "limit": "max_prompts"}

    prompts: Location | None = Field(
        None, description="prompts of the test images; null: the checker's, or those of calibration's split test"
    )
    suites: dict[str, Location] = Field(
        default_factory=dict,
        description="further test prompts by the name of the suite: JSON lines with prompt, and if you like id and "
        "category",
    )
    max_prompts: int | None = Field(
        64, ge=1, description="maximum number of test prompts to use, of each suite too; null: all"
    )
    batch_size: int = Field(16, ge=1, description="images per batch")
    checker: Literal["shapes"] | None = Field(
        None, description="prompt checker that scores images by category; shapes: that of the demo"
    )
    scorers: dict[str, ScorerSettings] = Field(
        default_factory=dict,
        # A stage of its own runs them: a new scorer draws no image again.
        json_schema_extra=OPERATIONAL,
        description="by a name of yours, what scores every image: a section ScorerSettings",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that generate images")


class Ablation(Section):
    """`ppcl ablate`: the gain of each part of the method, and other ways to choose the blocks to remove."""

    removed: int | None = Field(
        None, ge=1, description="number of blocks to remove; null: two fifths, at most what Algorithm 1 finds"
    )
    seeds: int = Field(3, ge=1, description="number of runs with different seeds, for confidence intervals")
    steps: int = Field(1000, ge=1, description="distillation steps of every row")
    batch_size: int = Field(16, ge=1, description="samples per distillation step")
    finetuning_steps: int = Field(300, ge=1, description="fine-tuning steps of the rows that have it")
    gate_steps: int = Field(200, ge=1, description="training steps of the learned gates")
    ffns: int = Field(3, ge=0, description="number of FFNs to replace by linear maps in the row that has them")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="seeds to run at once")
