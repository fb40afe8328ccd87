"""Replacements of every kind for the tiny teachers of all families, with random weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ppcl.config.schema import Config
from ppcl.models import adapter_of
from ppcl.models.teacher import Teacher
from ppcl.replacements import (
    Interval,
    LinearFfn,
    LowRankModulation,
    Plan,
    PrunedFfn,
    PrunedHeads,
    Replacement,
    TextRun,
)
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import files_in, save_replacement
from ppcl.replacements.linear_ffn import LinearFfnMaps
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.replacements.pruned_heads import HeadPaths, PrunedHeadMaps
from ppcl.replacements.student_block import StudentBlock, affine_map
from ppcl.replacements.text_projectors import TextProjectors
from ppcl.search.variants import Variant, VariantCatalog
from ppcl.storage.manifest import CONFIG, Artifacts
from ppcl.training.finetuning.tuned_blocks import read_block, tuned_blocks
from tests import tiny

WIDTH = 32
MAKERS = {"qwen": tiny.qwen_pipeline, "flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline}


class _Samples:
    def __init__(self, transformer: nn.Module):
        self.transformer = transformer

    def batch(self, ids, device, dtype):
        inputs = tiny.inputs(self.transformer, len(ids))
        return {**inputs, adapter_of(self.transformer).timestep: inputs[adapter_of(self.transformer).timestep].clone()}


def disturbed(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module


def student(teacher: Teacher, interval: Interval, affine: bool, source: int | None = None) -> StudentBlock:
    """A disturbed copy of one of the interval's blocks."""
    source = interval.first if source is None else source
    blocks = teacher.adapter.blocks(teacher.transformer())
    drops_text = getattr(blocks[interval.last], "context_pre_only", False)
    streams = ["img"] if drops_text else ["img", "txt"]
    maps = {stream: affine_map(WIDTH) for stream in streams} if affine else None
    return disturbed(StudentBlock(teacher.adapter, interval, source, copy.deepcopy(blocks[source]), maps), source)


def replacements(teacher: Teacher, folder: Path) -> dict[Replacement, Path]:
    """Of blocks 0 to 5 of a tiny teacher with at least six: those of the first list that has all kinds, and the last.

    `0-1` has an affine map, `2-3` is a stock block, `4-5` ends at the teacher's sixth block.
    """
    model, adapter = teacher.transformer(), teacher.adapter
    blocks = adapter.blocks(model)
    modules: dict[Replacement, nn.Module] = {
        LowRankModulation(): fit_basis(model, _Samples(model), np.arange(4), 64, 1e-4)
    }
    first = adapter.block_ranges(model)[0]
    modules[Interval(0, 1)] = student(teacher, Interval(0, 1), affine=True)
    modules[Interval(2, 3)] = student(teacher, Interval(2, 3), affine=False)
    modules[Interval(4, 5)] = student(teacher, Interval(4, 5), affine=False)
    modules[TextRun(1, 3)] = disturbed(TextProjectors(TextRun(1, 3), WIDTH, True), 5)
    for number in (0, 2):
        parts = adapter.parts_of(model, number, blocks[number])
        modules[LinearFfn(number)] = disturbed(LinearFfnMaps.new(parts, WIDTH), number)
        modules[PrunedFfn(number, 50)] = disturbed(PrunedFfnMaps.new(adapter, blocks[number], parts, 50), number)
    for number in (0, 2, first[-1]):
        paths = HeadPaths.of(adapter, model, number, blocks[number])
        heads = PrunedHeadMaps.new(blocks[number], paths, 50)
        # The second of two: of a LoRA other rows than the first ones belong to it.
        heads.heads = (1,)
        modules[PrunedHeads(number, 50)] = disturbed(heads, number)
    assert 3 in first
    for replacement, module in modules.items():
        save_replacement(module, replacement, adapter, folder / f"{replacement.name}.safetensors")
    return files_in(folder)


def trained_in_full(
    teacher: Teacher, files: Mapping[Replacement, Path], plan: Plan, folder: Path
) -> FinetunedSelection:
    """As if a plan had been fine-tuned with the teacher's blocks in it, and were better for it."""
    for one, left_out in tuned_blocks(teacher, {replacement: files[replacement] for replacement in plan}).items():
        block = disturbed(read_block(teacher, one, left_out, "cpu"), one.block)
        save_replacement(block, one, teacher.adapter, folder / f"{one.name}.safetensors")
    return FinetunedSelection(files_in(folder), {}, {frozenset(plan): 0.5})


def result(root: Path, teacher_folder: Path, custom: dict[str, str]) -> Path:
    """A finished job with these replacements, whose variants are plans by name."""
    teacher, artifacts = Teacher(teacher_folder), Artifacts(root)
    artifacts.start({"teacher": str(teacher_folder), "teacher_sha256": teacher.sha256(), "prompts": "0"})
    config = Config(teacher=teacher_folder, prompts="p.txt", sampling={"steps": 2, "height": 16, "width": 16})
    artifacts.path(CONFIG).write_text(config.model_dump_json())
    artifacts.path("students").mkdir()
    files = replacements(teacher, artifacts.path("students"))
    artifacts.commit("students", "0")
    counted = parameter_counts(teacher, files)
    variants = {name: Variant.of(name, Plan.parse(plan), counted) for name, plan in {"teacher": "", **custom}.items()}
    ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    catalog = VariantCatalog(counted.total, len(counted.blocks), ranges, dict.fromkeys(files, 0.1), variants)
    artifacts.path("variants").mkdir()
    artifacts.path("variants", "variants.json").write_text(json.dumps(catalog.to_json()))
    artifacts.commit("variants", "1")
    return root
