"""The card of an exported model: what it is, how it was made, what it scores, and how to load it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

import ppcl
from ppcl.export.variant_blocks import VariantBlocks
from ppcl.replacements import TunedBlock
from ppcl.replacements.parameter_counts import count_parameters
from ppcl.report.numbers import count
from ppcl.report.pictures import chosen_prompts
from ppcl.report.summary import rows_of
from ppcl.result import Result
from ppcl.search.variants import TEACHER, Variant
from ppcl.storage.results import read_results

# Pixels of an image on the contact sheet at most, and between two.
_SIDE, _GAP = 256, 4


@dataclass(frozen=True)
class CardFacts:
    """What an export says of itself. `blocks`: by running block, its entry in the configuration."""

    name: str
    plan: str
    family: str
    class_name: str
    pipeline_class: str
    parameters: int
    teacher_parameters: int
    teacher: str
    teacher_sha256: str
    licence: str | None
    dtype: str
    transformer_only: bool
    obstacles: list[str]
    blocks: list[dict[str, Any]]
    finetuned: bool
    tuned_blocks: int
    lora: str | None
    scores: dict[str, Any]
    prompts: int
    seen_prompts: int
    sampling: dict[str, Any]

    @classmethod
    def of(
        cls, result: Result, variant: Variant, blocks: VariantBlocks, dtype: torch.dtype, transformer_only: bool
    ) -> CardFacts:
        teacher = result.teacher
        results = read_results(result.artifacts.place)
        rows = {row["variant"]: row for row in rows_of(results)}
        evaluation = results.stage("evaluation")
        return cls(
            name=variant.name,
            plan=str(variant.plan),
            family=teacher.adapter.name,
            class_name=blocks.class_name,
            pipeline_class=teacher.pipeline_class,
            # Of the files: what a stock block makes of a student may be less.
            parameters=count_parameters(blocks.empty_model()),
            teacher_parameters=result.catalog.parameters,
            # Not its path, which is of a machine of ours.
            teacher=teacher.place.rstrip("/").rpartition("/")[2],
            # Compared with the teacher's when the result was opened.
            teacher_sha256=result.artifacts.manifest()["job"]["teacher_sha256"],
            licence=_licence(teacher.folder / "README.md"),
            dtype=str(dtype).removeprefix("torch."),
            transformer_only=transformer_only,
            obstacles=blocks.obstacles(),
            blocks=list(blocks.entries.values()),
            finetuned=result.finetuned(variant.name if variant.name in result.variants else list(variant.plan)),
            tuned_blocks=sum(isinstance(one, TunedBlock) for one in blocks.files),
            lora=_lora(blocks),
            # Without the LoRA.
            scores=rows.get(variant.name, {}) if variant.name in result.variants else {},
            prompts=len(evaluation.get("prompts", [])),
            seen_prompts=evaluation.get("splits", {}).get("seen_prompts", 0),
            sampling=result.sampling.model_dump(mode="json"),
        )

    def record(self) -> dict[str, Any]:
        """For programs: the content of `ppcl.json`."""
        return {
            "ppcl": ppcl.__version__,
            "variant": self.name,
            "plan": self.plan,
            "parameters": self.parameters,
            "teacher": {"parameters": self.teacher_parameters, "sha256": self.teacher_sha256},
            "blocks": self.blocks,
            "fine_tuned": self.finetuned,
            "tuned_blocks": self.tuned_blocks,
            "lora": self.lora,
        }


def model_card(facts: CardFacts, has_images: bool) -> str:
    """Markdown with the front matter that model hubs read."""
    environment = Environment(
        loader=PackageLoader("ppcl.export", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = count
    template = environment.get_template("model_card.md.j2")
    changes = [_changes(entry) for entry in facts.blocks]
    given = facts.sampling.get("arguments", {}).items()
    arguments = "".join(f", {name}={value!r}" for name, value in given)
    return template.render(
        facts=facts, changes=changes, arguments=arguments, has_images=has_images, version=ppcl.__version__
    ).rstrip()


def _changes(entry: dict[str, Any]) -> str:
    """What is not stock in a block, in words."""
    found = []
    if "affine" in entry:
        found.append("an affine map behind it")
    if "hidden" in entry:
        units = ", ".join(f"{stream} {count}" for stream, count in entry["hidden"].items())
        found.append(f"hidden units: {units}")
    if "heads" in entry:
        found.append(f"attention heads: {entry['heads']}")
    if "linear_ffn" in entry:
        found.append("a linear FFN")
    if "text_run" in entry:
        found.append(f"text run: {entry['text_run']}")
    return "; ".join(found)


def contact_sheet(result: Result, variant: str) -> bytes | None:
    """A PNG with the teacher's images above the variant's, of the same prompts and seeds; None without evaluation."""
    if variant == TEACHER:
        return None
    numbers = chosen_prompts(read_results(result.artifacts.place))
    names = [f"{number:04d}.png" for number in numbers]
    try:
        paths = [[result.artifacts.file("evaluation", "pictures", v, n) for v in (TEACHER, variant)] for n in names]
        images = [[Image.open(path).convert("RGB") for path in column] for column in paths]
    except (OSError, UnidentifiedImageError):
        # A picture is no reason to leave a model where it is.
        return None
    if not images:
        return None
    width, height = images[0][0].size
    scale = min(1.0, _SIDE / max(width, height))
    width, height = round(width * scale), round(height * scale)
    sheet = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, 2 * height + _GAP), "white")
    for x, column in enumerate(images):
        for y, image in enumerate(column):
            sheet.paste(image.resize((width, height)), (x * (width + _GAP), y * (height + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _lora(blocks: VariantBlocks) -> str | None:
    """The LoRA that is part of the weights, in words."""
    if blocks.lora is None:
        return None
    name = blocks.lora.lora.place.rpartition("/")[2]
    return f"{name}, {blocks.lora.scale:g} times its strength: {blocks.coverage()}"


def _licence(readme: Any) -> str | None:
    """The licence that a teacher's own card names."""
    try:
        found = re.search(r"^---\n.*?^license: *(\S+)\n.*?^---\n", readme.read_text(), re.MULTILINE | re.DOTALL)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None
