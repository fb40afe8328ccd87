"""A finished job of the tiny teacher, made without training: students that are blocks of the teacher, disturbed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from ppcl.config.schema import Config, Variants
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in, save
from ppcl.replacements.parameter_counts import sizes
from ppcl.replacements.plan import Interval
from ppcl.replacements.student_block import Student, affine_map
from ppcl.search.pareto import choose
from ppcl.search.variants import Family, budget_name, make_variants
from ppcl.storage.manifest import CONFIG, Artifacts

INTERVALS = [Interval(0, 1), Interval(2, 3), Interval(4, 5)]
DAMAGE = dict(zip(INTERVALS, (0.3, 0.1, 0.2), strict=True))


def student(teacher: Teacher, interval: Interval, affine: bool) -> Student:
    block = copy.deepcopy(teacher.architecture.blocks(teacher.transformer())[interval.first])
    generator = torch.Generator().manual_seed(interval.first)
    made = Student(
        teacher.architecture, interval, interval.first, block, {"img": affine_map(32)} if affine else None
    )
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
        save(made, interval, teacher.architecture, artifacts.path("students", f"{interval.name}.safetensors"))
    artifacts.commit("students", "0")
    counted = sizes(teacher, files_in(artifacts.path("students")))
    spans = [range(6)]
    settings = Variants(budgets=[0.9, 0.75], custom={"ends": [(0, 1), (4, 5)]})
    chosen = {budget_name(budget): choose(budget, counted, DAMAGE) for budget in settings.budgets}
    made = make_variants(settings, counted, DAMAGE, spans, chosen)
    artifacts.path("variants").mkdir()
    family = Family(counted.total, len(counted.blocks), spans, DAMAGE, made)
    artifacts.path("variants", "variants.json").write_text(json.dumps(family.to_json()))
    artifacts.commit("variants", "1")
    return root
