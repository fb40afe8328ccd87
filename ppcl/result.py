"""A finished job: its teacher, its replacements, and every variant of them as a stock pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.loading import validated
from ppcl.config.location import Location, LocationLike
from ppcl.config.plan_syntax import PLAN_SYNTAX
from ppcl.config.schema import Memory, Sampling
from ppcl.errors import UserError
from ppcl.lora import AppliedLora, Coverage, Lora, LoraTransfer, read_lora
from ppcl.models.placement import Images, Placement, place
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan, Replacement, parse_text
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import replacement_files
from ppcl.replacements.parameter_counts import ParameterCounts, parameter_counts
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.variants import TEACHER, Variant, available_plan, read_catalog
from ppcl.storage.manifest import CONFIG, Artifacts
from ppcl.training.lora_transfer import transfer_lora

CUSTOM = "custom"

# A LoRA's file, or what was read of it, alone or with its strength; or one that is applied already.
LoraChoice = LocationLike | Lora | tuple[LocationLike | Lora, float] | AppliedLora

# A variant's name, a plan as text, or a plan as a list.
Choice = str | Sequence[Replacement | str | Sequence[int]]


class Result:
    """A compressed model: what `ppcl compress` wrote to a folder or an `s3://` URL, with its teacher.

    `teacher`: where the teacher's folder is now, if it has moved. `memory`: the section of the configuration, or some
    of its keys, such as `{"offload": "group"}`. Raises `UserError` where a stage is missing, a file is damaged, or the
    teacher is gone or not the one that was compressed.
    """

    def __init__(
        self,
        folder: LocationLike,
        teacher: LocationLike | None = None,
        memory: Memory | Mapping[str, Any] | None = None,
    ):
        self.memory = memory if isinstance(memory, Memory) else validated(Memory, dict(memory or {}), "memory")
        self.artifacts = Artifacts(folder)
        job = self.artifacts.manifest()["job"]
        self._loras: dict[str, Lora] = {}
        self._transfers: dict[Lora, LoraTransfer] = {}
        self._check("variants")
        self.catalog = read_catalog(self.artifacts.path("variants"))
        self._check("students")
        self.teacher = _teacher(teacher or job["teacher"], job)
        self.replacements = replacement_files(self.artifacts.stage_files("students").paths())
        self.tuned = self._tuned()
        self._switch = VariantSwitcher(
            self.teacher, self.replacements, self.tuned, round(self.memory.replacements_gb * 1e9)
        )

    def _tuned(self) -> FinetunedSelection | None:
        """The fine-tuned replacements, where fine-tuning was done for the variants as they are."""
        done, variants = self.artifacts.record("finetuning"), self.artifacts.record("variants")
        # The version before kept the key of the variants there, this one keeps the digest of their files.
        if not done or not variants or done.info.get("variants") not in (variants.key, variants.digest):
            return None
        self._check("finetuning")
        tuned = FinetunedSelection.read(self.artifacts.path("finetuning"), self.catalog.sensitivity)
        return replace(tuned, files=replacement_files(self.artifacts.stage_files("finetuning").paths()))

    def _check(self, stage: str) -> None:
        """Raises `UserError` where a stage is not there or not intact."""
        if self.artifacts.record(stage) is None:
            raise UserError(
                f"{self.artifacts.place} has no {stage} yet; run ppcl compress again to continue from there"
            )
        if damaged := self.artifacts.damaged(stage):
            raise UserError(
                f"{self.artifacts.place}/{damaged[0]} is damaged or missing (its sha256 differs from the manifest's); "
                "run ppcl compress again to make it again"
            )

    @property
    def variants(self) -> dict[str, Variant]:
        return self.catalog.variants

    @cached_property
    def sampling(self) -> Sampling:
        """How the job called the pipeline: steps, size and further arguments; the size is that of the images.

        Pipelines round sizes down to multiples of a token's pixels; the same call with the rounded size is the same.
        """
        try:
            # Alone: other settings may have other names in the version that wrote the result.
            sampling = Sampling.model_validate(json.loads(self.artifacts.text(CONFIG))["sampling"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.artifacts.place}/{CONFIG} is damaged or missing; run ppcl compress again to make it again"
            ) from None
        multiple = self.teacher.pixels_a_token()
        drawn = {"height": sampling.height, "width": sampling.width}
        return sampling.model_copy(update={key: side // multiple * multiple for key, side in drawn.items()})

    def variant(self, choice: Choice) -> Variant:
        """A named variant, or any plan of trained replacements: a text such as `"3-5,text:8-9,ffn:1"`, or a list.

        Raises `UserError`, which names the variants and replacements that exist, for any other choice.
        """
        if isinstance(choice, str) and choice in self.variants:
            return self.variants[choice]
        plan = available_plan(self._entries(choice), self.replacements, self.catalog.block_ranges)
        return Variant.of(CUSTOM, plan, self._sizes)

    def plan_files(self, plan: Iterable[Replacement]) -> dict[Replacement, Path]:
        """The files of a plan's replacements, the fine-tuned ones where it takes them."""
        return self._switch.plan_files(plan)

    def finetuned(self, choice: Choice) -> bool:
        """Whether a variant takes fine-tuned replacements; see `ppcl.replacements.finetuned_selection`."""
        return bool(self._switch.finetuned(self.variant(choice).plan))

    @cached_property
    def _sizes(self) -> ParameterCounts:
        return parameter_counts(self.teacher, self.replacements)

    def _entries(self, choice: Choice) -> Sequence[Replacement | str | Sequence[int]]:
        if not isinstance(choice, str):
            return choice
        plan = parse_text(choice)
        if plan is None:
            raise UserError(
                f"there is no variant {choice!r}; there are {', '.join(self.variants)}, and plans written as "
                f"{PLAN_SYNTAX}, of {', '.join(map(str, self.replacements))}"
            )
        return plan

    def pipeline(
        self,
        variant: Choice = TEACHER,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: LoraChoice | None = None,
        lora_transfer: bool = False,
    ) -> Any:
        """A stock diffusers pipeline with the variant plugged in, placed as `memory.offload` says.

        `lora`: a LoRA of the teacher, alone or with a strength: `("ink.safetensors", 0.8)`. `coverage` says what of it
        the variant takes. `lora_transfer`: students take of it what they can, see `ppcl.training.lora_transfer` for how
        and at what cost; it is fitted once for each LoRA and student. Raises `UserError` for an unknown variant, for a
        LoRA that does not fit, for a device that is too small, and for calibration samples that are missing.
        """
        return self.placed_pipeline(variant, device, dtype, lora=lora, lora_transfer=lora_transfer)[0]

    def placed_pipeline(
        self,
        variant: Choice = TEACHER,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        images: Images | None = None,
        lora: LoraChoice | None = None,
        lora_transfer: bool = False,
    ) -> tuple[Any, Placement]:
        """`pipeline()`, and where its weights are. `images`: the largest call that it is made for."""
        plan, applied = self.variant(variant).plan, self._applied(lora)
        pipeline = self.teacher.pipeline("cpu", dtype)
        placement = place(pipeline, device, self.memory, images, self._switch.most_bytes(dtype))
        if applied and lora_transfer:
            applied = self._transferred(pipeline.transformer, plan, applied)
        self._switch(pipeline.transformer, plan, applied)
        return pipeline, placement

    def switch(
        self, pipeline: Any, variant: Choice, lora: LoraChoice | None = None, lora_transfer: bool = False
    ) -> None:
        """Switch a pipeline that `pipeline()` made to another variant, with a LoRA or without.

        Moves references only; replacements and LoRAs load when first used, and transfers are fitted then. Call it while
        the pipeline is not running. Raises `UserError` for an unknown variant or a LoRA that does not fit, and then
        leaves the pipeline as it was.
        """
        plan, applied = self.variant(variant).plan, self._applied(lora)
        if applied and lora_transfer:
            applied = self._transferred(pipeline.transformer, plan, applied)
        self._switch(pipeline.transformer, plan, applied)

    def coverage(self, pipeline: Any, variant: Choice, lora: LoraChoice, lora_transfer: bool = False) -> Coverage:
        """What of a LoRA is on with a variant in a pipeline of this result; the variant replaces the rest."""
        plan, applied = self.variant(variant).plan, self.applied_lora(lora)
        if lora_transfer:
            applied = self._transferred(pipeline.transformer, plan, applied)
        return self._switch.coverage(pipeline.transformer, plan, applied)

    def applied_lora(self, lora: LoraChoice) -> AppliedLora:
        """A LoRA that is read and checked; one place is read once. Raises `UserError`."""
        if isinstance(lora, AppliedLora):
            return lora
        place, scale = lora if isinstance(lora, tuple) else (lora, 1.0)
        if isinstance(place, Lora):
            return AppliedLora(place, float(scale))
        key = str(Location.of(place))
        if key not in self._loras:
            self._loras[key] = read_lora(place, self.teacher)
        return AppliedLora(self._loras[key], float(scale))

    def transferred_loras(
        self,
        variants: Iterable[Choice],
        loras: Iterable[LoraChoice],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> list[AppliedLora]:
        """LoRAs with what the students of some variants take of them, fitted on a teacher that is let go afterwards.

        Memory: the teacher's transformer, placed on the device as `memory.offload` says. Raises `UserError`.
        """
        plans = [self.variant(variant).plan for variant in variants]
        read = [self.applied_lora(lora) for lora in loras]
        pipeline = self.teacher.pipeline("cpu", dtype, transformer_only=True)
        # Its replacements go with it.
        switch = VariantSwitcher(self.teacher, self.replacements, self.tuned, self._switch.limit)
        place(pipeline, device, self.memory, beside=switch.most_bytes(dtype))
        for plan in plans:
            read = [self._transferred(pipeline.transformer, plan, applied, switch) for applied in read]
        return read

    def _transferred(
        self, transformer: Any, plan: Plan, applied: AppliedLora, switch: VariantSwitcher | None = None
    ) -> AppliedLora:
        transfer = self._transfers.setdefault(applied.lora, LoraTransfer())
        transfer_lora(switch or self._switch, transformer, plan, applied.lora, transfer, self._calibration)
        return replace(applied, transfer=transfer)

    def _calibration(self) -> CalibrationSet:
        if self.artifacts.record("calibration") is None:
            raise UserError(
                f"{self.artifacts.place} has no calibration samples, to which a LoRA's transfer to students with "
                "affine maps is fitted; run ppcl compress again to make them, or leave the transfer out"
            )
        return CalibrationSet.of(self.artifacts.stage_files("calibration"))

    def _applied(self, lora: LoraChoice | None) -> AppliedLora | None:
        return None if lora is None else self.applied_lora(lora)


def _teacher(folder: LocationLike, job: dict[str, Any]) -> Teacher:
    """The teacher of a job in the manifest, which may lie in another place than then."""
    location = Location.of(folder)
    if not location.is_url and not location.path.is_dir():
        raise UserError(
            f"the teacher's folder {folder} does not exist any more; give its new path: --teacher on the command line, "
            "teacher= in Python"
        )
    teacher = Teacher(location, job.get("teacher_hashes"))
    if teacher.sha256() != job["teacher_sha256"]:
        raise UserError(
            f"the transformer in {folder} is not the teacher of this result (its sha256 differs from the manifest's); "
            "give the path of the unchanged teacher as teacher="
        )
    return teacher
