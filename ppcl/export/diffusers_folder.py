"""`--format diffusers`: a folder that stock diffusers loads, with one module beside it where blocks are not stock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ppcl.config.location import Location, LocationLike
from ppcl.export.destination import Destination, destination
from ppcl.export.model_card import CardFacts, contact_sheet, model_card
from ppcl.export.transformer_files import Progress, WeightPlan, write_weights
from ppcl.export.variant_blocks import VariantBlocks
from ppcl.models import pruned_transformer
from ppcl.models.teacher import EXPORTED_MODULE, Teacher
from ppcl.result import Choice, LoraChoice, Result

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Files of the teacher's own folder that go with its weights wherever they go.
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def export_folder(
    result: Result,
    choice: Choice,
    to: LocationLike,
    dtype: torch.dtype = torch.bfloat16,
    transformer_only: bool = False,
    progress: Progress = lambda done, total: None,
    lora: LoraChoice | None = None,
) -> CardFacts:
    """Write a variant as a diffusers pipeline, or its transformer alone, to a new folder; gives what its card says.

    `lora`: a LoRA that becomes part of the weights, see `Result.pipeline`; with what students take of it from
    `Result.transferred_loras`.

    Cost: every weight of the variant is read and written once; memory is that of one block. Raises `UserError` where
    the place is taken or too small, or a file of the result cannot be read; nothing is left then.
    """
    variant, location = result.variant(choice), Location.of(to)
    applied = None if lora is None else result.applied_lora(lora)
    blocks = VariantBlocks(result.teacher, result.plan_files(variant.plan), applied)
    inside = "" if transformer_only else "transformer/"
    plan = WeightPlan.of(blocks, dtype, f"{inside}{_WEIGHTS}")
    plan.check(blocks.empty_model().state_dict())
    with destination(location, last=f"{inside}config.json" if transformer_only else "model_index.json") as folder:
        others = [] if transformer_only else _other_files(result.teacher)
        folder.check_room(plan.bytes + sum(path.stat().st_size for path, _ in others))
        write_weights(blocks, plan, dtype, folder, progress)
        facts = CardFacts.of(result, variant, blocks, dtype, transformer_only)
        if len(plan.files) > 1:
            index = {"metadata": {"total_size": plan.bytes}, "weight_map": plan.weight_map()}
            _write(folder, f"{inside}{_WEIGHTS}.index.json", json.dumps(index, indent=1))
        for path, name in [*others, *_licences(result.teacher)]:
            shutil.copyfile(path, folder.path(name))
            folder.finished(name)
        if blocks.obstacles():
            _write(folder, f"{EXPORTED_MODULE}.py", Path(pruned_transformer.__file__).read_text())
        if sheet := contact_sheet(result, variant.name):
            folder.path("images.png").write_bytes(sheet)
            folder.finished("images.png")
        _write(folder, "README.md", model_card(facts, has_images=sheet is not None))
        _write(folder, "ppcl.json", json.dumps(facts.record(), indent=1))
        _write(folder, f"{inside}config.json", json.dumps(blocks.config, indent=1))
        if not transformer_only:
            _write(folder, "model_index.json", json.dumps(_model_index(result.teacher, blocks), indent=1))
    return facts


def _write(folder: Destination, name: str, text: str) -> None:
    folder.path(name).write_text(text + "\n")
    folder.finished(name)


def _model_index(teacher: Teacher, blocks: VariantBlocks) -> dict[str, Any]:
    index = json.loads((teacher.folder / "model_index.json").read_text())
    if blocks.obstacles():
        index["transformer"] = [EXPORTED_MODULE, blocks.class_name]
    return {key: value for key, value in index.items() if key != "_name_or_path"}


def _other_files(teacher: Teacher) -> list[tuple[Path, str]]:
    """The pipeline's other parts: where they lie on this machine, and their paths in the folder."""
    root = teacher.with_weights(transformer=False)
    return [(root / real, name) for name, real in teacher.part_files().items()]


def _licences(teacher: Teacher) -> list[tuple[Path, str]]:
    return [
        (path, path.name)
        for path in sorted(teacher.folder.iterdir())
        if path.is_file() and path.name.upper().startswith(_LICENCES)
    ]
