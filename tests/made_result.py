"""A finished job of the tiny teacher, made without training: students that are blocks of the teacher, disturbed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from ppcl.config.schema import Config, Variants
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.io import files_in, save_replacement
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.student_block import StudentBlock, affine_map
from ppcl.search.pareto import choose, pareto_front
from ppcl.search.variants import VariantCatalog, budget_name, make_variants
from ppcl.storage.manifest import CONFIG, Artifacts

INTERVALS = [Interval(0, 1), Interval(2, 3), Interval(4, 5)]
SENSITIVITY = dict(zip(INTERVALS, (0.3, 0.1, 0.2), strict=True))


def student(teacher: Teacher, interval: Interval, affine: bool) -> StudentBlock:
    block = copy.deepcopy(teacher.adapter.blocks(teacher.transformer())[interval.first])
    generator = torch.Generator().manual_seed(interval.first)
    made = StudentBlock(teacher.adapter, interval, interval.first, block, {"img": affine_map(32)} if affine else None)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return made


def result(root: Path, teacher_folder: Path) -> Path:
    """Variants: `p90`, `p75`, `all`, and the custom `ends`; the first student has an affine map."""
    teacher, artifacts = Teacher(teacher_folder), Artifacts(root)
    artifacts.start({"teacher": str(teacher_folder), "teacher_sha256": teacher.sha256(), "prompts": "0"})
    config = Config(teacher=teacher_folder, prompts="p.txt", sampling={"steps": 2, "height": 32, "width": 32})
    artifacts.path(CONFIG).write_text(config.model_dump_json())
    for number, interval in enumerate(INTERVALS):
        made = student(teacher, interval, affine=number == 0)
        save_replacement(made, interval, teacher.adapter, artifacts.path("students", f"{interval.name}.safetensors"))
    artifacts.commit("students", "0")
    counted = parameter_counts(teacher, files_in(artifacts.path("students")))
    block_ranges = [range(6)]
    settings = Variants(budgets=[0.9, 0.75], custom={"ends": [(0, 1), (4, 5)]})
    front = pareto_front(counted, SENSITIVITY)
    chosen = {budget_name(budget): choose(budget, counted, front) for budget in settings.budgets}
    made = make_variants(settings, counted, SENSITIVITY, block_ranges, chosen)
    artifacts.path("variants").mkdir()
    catalog = VariantCatalog(counted.total, len(counted.blocks), block_ranges, SENSITIVITY, made)
    artifacts.path("variants", "variants.json").write_text(json.dumps(catalog.to_json()))
    artifacts.commit("variants", "1")
    return root
