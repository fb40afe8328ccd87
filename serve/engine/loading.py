"""What the served variants need, and nothing else: their replacements, and the teacher's blocks that one of them keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppcl.errors import UserError
from ppcl.replacements.plan import Interval, Replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.result import Result
from ppcl.search.variants import Variant
from ppcl.storage.manifest import Artifacts
from ppcl.storage.results import read_results

# Longer texts are no plan of any transformer.
_LONGEST_PLAN = 4096


@dataclass(frozen=True)
class Weights:
    """A pipeline in memory, and the variants that can be switched to. `blocks`: numbers of the teacher's that were loaded."""

    result: Result
    pipeline: Any
    switch: VariantSwitcher
    variants: dict[str, Variant]
    blocks: frozenset[int]

    def variant(self, model: str) -> Variant | None:
        """A served variant by its name, or any plan of what is in memory, as text; None where it is neither."""
        if model in self.variants:
            return self.variants[model]
        if len(model) > _LONGEST_PLAN or model in self.result.variants:
            return None
        try:
            variant = self.result.variant(model)
        except UserError:
            return None
        if (
            not set(variant.plan) <= set(self.switch.files)
            or not _kept(variant.plan, len(self._numbers)) <= self.blocks
        ):
            return None
        return variant if self.switch.in_memory(self.pipeline.transformer, variant.plan) else None

    @property
    def _numbers(self) -> range:
        return range(self.result.catalog.blocks)


def load(result: Path, teacher: Path | None, names: Sequence[str] | None, device: str, dtype: torch.dtype) -> Weights:
    """Read the variants `names` of a result, all by default; their files' hashes are those of its manifest.

    Raises `UserError` where a name is none, or the result is not intact.
    """
    import diffusers

    # Its warnings tell prompts.
    diffusers.utils.logging.set_verbosity_error()
    opened = Result(result, teacher)
    for name in names or ():
        if name not in opened.variants:
            raise UserError(
                f"engine.variants: there is no variant {name!r} in {result}; there are {', '.join(opened.variants)}"
            )
    variants = {name: opened.variants[name] for name in names or opened.variants}
    blocks = frozenset().union(*(_kept(variant.plan, opened.catalog.blocks) for variant in variants.values()))
    transformer = opened.teacher.transformer(keep=blocks, device=device, dtype=dtype)
    pipeline = getattr(diffusers, opened.teacher.pipeline_class).from_pretrained(
        opened.teacher.with_weights(transformer=False),
        transformer=transformer,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    needed = {entry for variant in variants.values() for entry in variant.plan}
    switch = VariantSwitcher(
        opened.teacher, {e: path for e, path in opened.replacements.items() if e in needed}, opened.tuned
    )
    for variant in variants.values():
        # Read now, so that no request waits for a file.
        switch(pipeline.transformer, variant.plan)
    return Weights(opened, pipeline, switch, variants, blocks)


def _kept(plan: Iterable[Replacement], count: int) -> set[int]:
    """The blocks of the teacher of which something is still used with a plan on."""
    return set(range(count)) - {block for entry in plan if isinstance(entry, Interval) for block in entry.blocks}


def qualities(result: Path, variants: Iterable[str]) -> dict[str, float | None]:
    """A score in [0, 1] of each variant, from the result's evaluation: the share of images that are right, where a world tells,
    else one less the velocity's relative squared error. None where it was not evaluated."""
    if Artifacts(result).damaged("evaluation"):
        raise UserError(f"the evaluation in {result} is damaged; run ppcl compress again, which makes it anew")
    measured = read_results(result).stage("evaluation").get("variants", {})
    return {name: _quality(measured[name]) if name in measured else None for name in variants}


def _quality(row: dict[str, Any]) -> float:
    if row["world"] is not None:
        return row["world"]["overall"]["score"]
    return max(0.0, 1.0 - row["velocity_error"])
