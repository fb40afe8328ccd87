"""Samples of the teacher: the call of its pipeline, and the calibration set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ppcl.config.loading import Section
from ppcl.config.sections.fields import OPERATIONAL, Pixels, Share


class Sampling(Section):
    """Arguments of the pipeline's call in calibration and evaluation."""

    steps: int = Field(
        20,
        ge=1,
        le=1000,
        description="denoising steps of a trajectory; for a few-step teacher those it was distilled for, such as 4",
    )
    height: Pixels = Field(
        1024, description="height of the images, pixels; a multiple of 8, of 16 for published models"
    )
    width: Pixels = Field(1024, description="width of the images, pixels; a multiple of 8, of 16 for published models")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the pipeline's call, such as true_cfg_scale, negative_prompt, guidance_scale "
        "and sigmas; what is left out has the pipeline's default",
    )


class Calibration(Section):
    """Samples of the teacher. Their prompts are split: train to fit on, validation to choose on, test to report on."""

    renamed: ClassVar[dict[str, str]] = {"limit": "max_prompts", "held_out": "validation"}

    source: Literal["trajectories", "images"] = Field(
        "trajectories",
        description="trajectories: states of the teacher's own sampling trajectories (needs prompts only); "
        "images: VAE latents of the images named in image_column, noised to the levels that sampling visits",
    )
    prompt_column: str = Field("prompt", description="column of the prompts in .jsonl, .csv and .parquet files")
    image_column: str = Field("image", description="column of the images: paths relative to the prompt file, or URLs")
    max_prompts: int | None = Field(None, ge=1, description="maximum number of prompts to use; null: all")
    states_per_prompt: int = Field(
        4, ge=1, description="timesteps kept of each prompt's trajectory, or noised of each image"
    )
    validation: Share = Field(
        0.125,
        description="share of the prompts that CKA, sensitivities and plans are measured on; nothing is fitted on them",
    )
    test: Share = Field(
        0.125, description="share of the prompts that evaluation alone looks at; nothing is fitted or chosen on them"
    )
    batch_size: int = Field(16, json_schema_extra=OPERATIONAL, ge=1, description="prompts per batch")
    workers: int = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that encode prompts and run the teacher"
    )

    @model_validator(mode="after")
    def _leaves_prompts_to_train_on(self) -> Calibration:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test are {self.validation:g} and {self.test:g}, which leaves no prompts to train on; "
                "give shares whose sum is below 1"
            )
        return self
