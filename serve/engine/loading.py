"""Load what the served variants need: their replacements, and the teacher's blocks that at least one of them keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.lora import AppliedLora
from ppcl.replacements import Replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.report.benchmarks import benchmark_records
from ppcl.result import Result
from ppcl.search.variants import Variant
from ppcl.storage.manifest import Artifacts
from ppcl.storage.object_store import Store
from ppcl.storage.results import Results, read_results
from serve.config import EngineSettings

# No plan of any transformer has a longer text.
_MAX_PLAN_LENGTH = 4096
_LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Weights:
    """A pipeline in memory and its variants. `blocks`: indices of the teacher's loaded blocks.

    `loras`: by name, at full strength. `lora_shares`: by variant and LoRA, the share of it that the variant takes.
    """

    result: Result
    pipeline: Any
    switch: VariantSwitcher
    variants: dict[str, Variant]
    blocks: frozenset[int]
    loras: dict[str, AppliedLora] = field(default_factory=dict)
    lora_shares: dict[str, dict[str, float]] = field(default_factory=dict)

    def variant(self, model: str) -> Variant | None:
        """Return a served variant by name, or any plan in memory by its text; None for anything else."""
        if model in self.variants:
            return self.variants[model]
        if len(model) > _MAX_PLAN_LENGTH or model in self.result.variants:
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


def load(
    result: LocationLike, teacher: LocationLike | None, settings: EngineSettings, device: str, dtype: torch.dtype
) -> Weights:
    """Read the configured variants of a result; their files' hashes are those of its manifest.

    Raises `UserError` where a name is none, the result is not intact, or a LoRA does not fit.
    """
    names = settings.variants
    import diffusers

    # Its warnings contain prompts.
    diffusers.utils.logging.set_verbosity_error()
    source = Result(result, teacher)
    for name in names or ():
        if name not in source.variants:
            raise UserError(
                f"engine.variants: there is no variant {name!r} in {result}; there are {', '.join(source.variants)}"
            )
    variants = {name: source.variants[name] for name in names or source.variants}
    loras = _loras(settings, source, variants, device, dtype)
    blocks = frozenset().union(*(_kept(variant.plan, source.catalog.blocks) for variant in variants.values()))
    transformer = source.teacher.transformer(keep=blocks, device=device, dtype=dtype)
    pipeline = getattr(diffusers, source.teacher.pipeline_class).from_pretrained(
        source.teacher.with_weights(transformer=False),
        transformer=transformer,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    needed = {replacement for variant in variants.values() for replacement in variant.plan}
    switch = VariantSwitcher(
        source.teacher,
        {replacement: path for replacement, path in source.replacements.items() if replacement in needed},
        source.tuned,
    )
    for variant in variants.values():
        # Read the files now, so that no request waits for them.
        switch(pipeline.transformer, variant.plan)
    shares = {
        name: {lora: switch.coverage(pipeline.transformer, variant.plan, read).share for lora, read in loras.items()}
        for name, variant in variants.items()
    }
    return Weights(source, pipeline, switch, variants, blocks, loras, shares)


def _loras(
    settings: EngineSettings, result: Result, variants: Iterable[str], device: str, dtype: torch.dtype
) -> dict[str, AppliedLora]:
    """Read the LoRAs that are served, with what the variants' students take of them if that is wanted, by name.

    Raises `UserError`.
    """
    if settings.loras is None:
        if settings.lora_transfer:
            raise UserError("engine.lora_transfer has no LoRA to transfer; name their folder in engine.loras")
        return {}
    loras = _in_folder(settings.loras, result)
    if settings.lora_transfer:
        # Before the pipeline is loaded: it takes the whole teacher.
        read = [applied.lora for applied in loras.values()]
        loras = dict(zip(loras, result.transferred_loras(variants, read, device, dtype), strict=True))
    return loras


def _in_folder(folder: Location, result: Result) -> dict[str, AppliedLora]:
    """Read the LoRAs of a folder, by the names of their files. Raises `UserError`."""
    if folder.is_url:
        names = sorted(name for name in Store(folder.url).objects() if "/" not in name)
    elif folder.path.is_dir():
        names = sorted(path.name for path in folder.path.iterdir() if path.is_file())
    else:
        raise UserError(f"engine.loras: {folder} is no folder; give one with LoRAs as .safetensors files")
    loras = {}
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        if dot and suffix == "safetensors":
            if not _LORA_NAME.fullmatch(stem):
                raise UserError(f"engine.loras: {name} has a name that no request can give; use letters, digits, . _ -")
            loras[stem] = result.applied_lora(folder / name)
    if not loras:
        raise UserError(f"engine.loras: {folder} holds no .safetensors file; leave engine.loras out")
    return loras


def _kept(plan: Iterable[Replacement], count: int) -> set[int]:
    """Return the teacher's blocks that a plan does not replace completely."""
    return set(range(count)) - {block for item in plan if item.removed for block in item.blocks}


def qualities(result: LocationLike, variants: Iterable[str], score: str | None = None) -> dict[str, float | None]:
    """Return each variant's quality in [0, 1], None where nothing trusted says it.

    `score`: the name of a scorer: its quality is the share of the teacher's score that is left, the mean over suites.
    None: the prompt checker's share of correct images. The velocity's error is none: a variant whose images are wrong
    in two of three cases can have 7 %. Raises `UserError` where the evaluation is damaged, and for an unknown score.
    """
    if Artifacts(result).damaged("evaluation"):
        raise UserError(f"the evaluation in {result} is damaged; run ppcl compress again to make it again")
    results = read_results(result)
    if score is not None:
        return _by_score(results, variants, score)
    evaluated = results.stage("evaluation").get("variants", {})
    return {name: _quality(evaluated[name]) if name in evaluated else None for name in variants}


def _quality(row: dict[str, Any]) -> float | None:
    return None if row["world"] is None else row["world"]["overall"]["score"]


def _by_score(results: Results, variants: Iterable[str], score: str) -> dict[str, float | None]:
    records = benchmark_records(results)
    chosen = [record for record in records if record["scorer"] == score]
    if not chosen:
        known = ", ".join(dict.fromkeys(record["scorer"] for record in records)) or "none"
        raise UserError(
            f"elastic.score: the result has no score {score!r} of its variants as they are; it has {known}; add a "
            "scorer to its job, or give scores with ppcl score"
        )
    if any(row["R"] is None for record in chosen for row in record["variants"].values()):
        raise UserError(
            f"elastic.score: {score!r} cannot be a share of the teacher's, whose mean may be 0 or less, or is missing; "
            "list in elastic.variants what auto may take"
        )
    qualities: dict[str, float | None] = {}
    for name in variants:
        drops = [record["variants"][name]["R"] for record in chosen if name in record["variants"]]
        qualities[name] = min(1.0, max(0.0, 1 - sum(drops) / len(drops) / 100)) if drops else None
    return qualities
