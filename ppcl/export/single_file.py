"""`--format single-file`: the transformer in one file, with the tensors' names of the family's original release."""

from __future__ import annotations

import torch

from ppcl.config.location import Location, LocationLike
from ppcl.errors import UserError
from ppcl.export.destination import check_free, destination
from ppcl.export.model_card import CardFacts
from ppcl.export.original_keys import original_tensors
from ppcl.export.transformer_files import Progress, WeightPlan, write_weights
from ppcl.export.variant_blocks import RunningBlock, Tensors, VariantBlocks
from ppcl.result import Choice, LoraChoice, Result


def export_file(
    result: Result,
    choice: Choice,
    to: LocationLike,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = lambda done, total: None,
    lora: LoraChoice | None = None,
) -> CardFacts:
    """Write a variant's transformer to one new file, `to` being its path or URL, which ends in `.safetensors`.

    Raises `UserError` where a block is not a stock block, with the replacements that stand in the way and a variant
    that has none of them.
    """
    check_export(result, choice, to, single_file=True)
    location, variant = Location.of(to), result.variant(choice)
    applied = None if lora is None else result.applied_lora(lora)
    blocks = VariantBlocks(result.teacher, result.plan_files(variant.plan), applied)

    def convert(place: RunningBlock | None, tensors: Tensors) -> Tensors:
        name = result.teacher.adapter.transformer
        if place is None:
            return original_tensors(name, None, 0, False, tensors)
        state = {key.removeprefix(place.prefix): tensor for key, tensor in tensors.items()}
        return original_tensors(name, place.block_list, place.position, blocks.text_is_dropped(place), state)

    folder, name = location.parent
    plan = WeightPlan.of(blocks, dtype, name, convert, most=1 << 62)
    with destination(folder, last=name, single=True) as made:
        made.check_room(plan.bytes)
        write_weights(blocks, plan, dtype, made, progress, convert)
        made.finished(name)
    return CardFacts.of(result, variant, blocks, dtype, transformer_only=True)


def check_export(result: Result, choice: Choice, to: LocationLike, single_file: bool) -> None:
    """Raises `UserError` for a place that is taken, and for a plan that a single file cannot hold."""
    location, variant = Location.of(to), result.variant(choice)
    if not single_file:
        check_free(location, "")
        return
    if not location.text.endswith(".safetensors"):
        raise UserError(f"a single file ends in .safetensors; {location} does not")
    if obstacles := VariantBlocks(result.teacher, result.plan_files(variant.plan)).obstacles():
        raise UserError(_not_stock(result, variant.name, obstacles))
    check_free(*location.parent, single=True)


def _not_stock(result: Result, name: str, obstacles: list[str]) -> str:
    """One sentence: what stands in the way, and what to do."""
    stock = [other for other, variant in result.variants.items() if variant.plan and is_stock(result, other)]
    if stock:
        advice = f"of this result {', '.join(stock)} would do"
    else:
        advice = (
            "no variant of this result has stock blocks alone: train with distillation.init first, and choose "
            "intervals only"
        )
    return (
        f"{name} holds {' and '.join(obstacles)}, which the layout of the original release cannot hold; {advice}, or "
        "use --format diffusers"
    )


def is_stock(result: Result, choice: Choice) -> bool:
    """Whether stock classes load a variant."""
    return not VariantBlocks(result.teacher, result.plan_files(result.variant(choice).plan)).obstacles()
