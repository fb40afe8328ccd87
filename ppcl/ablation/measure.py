"""Measuring the rows of the ablation: velocity error on the split test, and images that a checker looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ppcl.evaluation.images import generate_images
from ppcl.evaluation.prompt_checker import checker_prompts, correctness, load_checker
from ppcl.evaluation.scoring import relative_drop
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.placement import Images, place
from ppcl.replacements import Replacement
from ppcl.replacements.io import files_in
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.switcher import VariantSwitcher

if TYPE_CHECKING:
    from ppcl.ablation.run import AblationInputs

# Images of the ablation have seeds of their own.
_FIRST_SEED = 1_000_000


class RowMeasurer:
    """Measures plans on one pipeline, each with the replacements that its row trained."""

    def __init__(self, inputs: AblationInputs, seed: int):
        self.config, self.teacher, self.samples, self.seed = inputs.config, inputs.teacher, inputs.samples, seed
        self.device, self.dtype = inputs.device, inputs.dtype
        self.pipeline = self.teacher.pipeline("cpu", self.dtype)
        evaluation, sampling = self.config.evaluation, self.config.sampling
        images = Images(evaluation.batch_size, sampling.height, sampling.width)
        place(self.pipeline, self.device, self.config.memory, images)
        self.checker = load_checker(evaluation.checker) if evaluation.checker else None
        seen = self.samples.seen_prompts()
        self.prompts = (
            checker_prompts(self.checker, evaluation.max_prompts, self.config.seed, seen) if self.checker else []
        )

    @torch.no_grad()
    def measure(
        self,
        plans: Mapping[str, Sequence[Replacement]],
        folders: Mapping[str, Path],
        library: Mapping[Replacement, Path],
        tell: Callable[[int], None],
    ) -> dict[str, Any]:
        """By row, its measurements. `tell(done)` counts rows.

        `library`: the replacements that rows share; a row's own folder takes precedence over it.
        """
        teacher_passes = self._correctness(VariantSwitcher(self.teacher, {}), ())
        rows: dict[str, Any] = {}
        # The same plan of the same students is the same row.
        measured: dict[tuple[Path, tuple[Replacement, ...]], dict[str, Any]] = {}
        for number, (name, plan) in enumerate(plans.items()):
            key = folders[name], tuple(plan)
            if key not in measured:
                available = dict(library) | files_in(folders[name])
                files = {replacement: path for replacement, path in available.items() if replacement in plan}
                measured[key] = self._row(plan, files, teacher_passes)
            rows[name] = measured[key]
            tell(number + 1)
        return rows

    def _row(
        self, plan: Sequence[Replacement], files: Mapping[Replacement, Path], teacher_passes: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        switch = VariantSwitcher(self.teacher, files)
        counts = parameter_counts(self.teacher, files)
        row = {
            "velocity_error": self._velocity_error(switch, plan),
            "share": counts.parameters(plan) / counts.total,
            "plan": [str(replacement) for replacement in plan],
        }
        if self.checker:
            passes = self._correctness(switch, plan)
            row["R"] = relative_drop(passes, teacher_passes, self.config.evaluation.confidence, self.seed)["R"]
            row["world"] = sum(float(share.mean()) for share in passes.values()) / len(passes)
        return row

    def _velocity_error(self, switch: VariantSwitcher, plan: Sequence[Replacement]) -> float:
        ids, size = self.samples.ids("test"), self.config.evaluation.batch_size
        batches = (self.samples.batch(ids[i : i + size], self.device, self.dtype) for i in range(0, len(ids), size))
        sums = (variant_errors(self.pipeline.transformer, switch, {"row": plan}, batch)["row"] for batch in batches)
        return ErrorSums.joined(sums).overall()

    def _correctness(self, switch: VariantSwitcher, plan: Sequence[Replacement]) -> dict[str, np.ndarray]:
        """By category, 1 for each image that shows its caption and 0 for the others; empty without a checker."""
        if self.checker is None:
            return {}
        size, passes = self.config.evaluation.batch_size, dict[str, list[float]]()
        switch(self.pipeline.transformer, plan)
        for start in range(0, len(self.prompts), size):
            prompts = self.prompts[start : start + size]
            seeds = [_FIRST_SEED + self.config.seed + start + index for index in range(len(prompts))]
            images = generate_images(self.pipeline, [p.text for p in prompts], seeds, self.config.sampling)
            for category, shown in correctness(self.checker, images, prompts).items():
                passes.setdefault(category, []).extend(shown)
        switch(self.pipeline.transformer, ())
        return {category: np.array(shown, dtype=np.float64) for category, shown in passes.items()}
