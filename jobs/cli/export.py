"""`ppcl export`: a variant as a model that needs no ppcl."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.cli.progress_lines import ProgressLines
from jobs.cli.shared import lora_choice, out
from ppcl.errors import UserError


class Format(StrEnum):
    """The layouts of an export."""

    DIFFUSERS = "diffusers"
    SINGLE_FILE = "single-file"


class Dtype(StrEnum):
    """The number formats of an export's weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def export(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    variant: Annotated[str, typer.Option(help="a name that `ppcl variants` lists, or a plan such as 3-5,ffn:1")],
    to: Annotated[str, typer.Option(help="new folder, or new .safetensors file, here or at s3://bucket/key")],
    format_: Annotated[
        Format,
        typer.Option(
            "--format", help="a diffusers folder, or one file with the tensors' names of the family's original release"
        ),
    ] = Format.DIFFUSERS,
    dtype: Annotated[Dtype, typer.Option(help="number format of the transformer's weights")] = Dtype.BFLOAT16,
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="leave out the text encoders, the VAE and the scheduler")
    ] = False,
    lora: Annotated[
        str | None, typer.Option(help="a LoRA of the teacher that becomes part of the weights, a .safetensors file")
    ] = None,
    lora_scale: Annotated[float, typer.Option(help="how strongly it is on, times what it was trained to")] = 1.0,
    lora_transfer: Annotated[
        bool, typer.Option("--lora-transfer", help="have students take what the LoRA changes in blocks they replace")
    ] = False,
    teacher: Annotated[str | None, typer.Option(help="path of the teacher, if it has moved")] = None,
) -> None:
    """Write a variant as a model of its own, which needs no ppcl to run."""
    import torch

    from jobs.runtime.cluster import best_device
    from ppcl.export import check_export, export_file, export_folder
    from ppcl.result import Result

    if format_ is Format.SINGLE_FILE and transformer_only:
        raise UserError(
            "--transformer-only is for --format diffusers: a single file holds the transformer alone anyway"
        )
    opened = Result(result, teacher=teacher)
    weights = getattr(torch, dtype.value)
    chosen = lora_choice(lora, lora_scale, lora_transfer)
    applied = None if chosen is None else opened.applied_lora(chosen)
    if chosen and lora_transfer:
        # What the export would be refused for, before the transfer is fitted.
        check_export(opened, variant, to, single_file=format_ is Format.SINGLE_FILE)
        device = best_device()
        # As in a job, whatever the number format of what is written.
        precision = torch.bfloat16 if device == "cuda" else torch.float32
        (applied,) = opened.transferred_loras([variant], [chosen], device, precision)
    with ProgressLines("written", gb=True) as progress:
        if format_ is Format.SINGLE_FILE:
            facts = export_file(opened, variant, to, weights, progress, applied)
        else:
            facts = export_folder(opened, variant, to, weights, transformer_only, progress, applied)
    share = 100 * facts.parameters / facts.teacher_parameters
    _say(f"{to}: {facts.class_name}, {facts.parameters:,} parameters, {share:.1f} % of the teacher's, {facts.dtype}")
    if facts.lora:
        _say(f"with the LoRA {facts.lora}")
    if facts.obstacles and format_ is Format.DIFFUSERS:
        _say(
            f"it holds {', '.join(facts.obstacles)}: import ppcl_transformer.py, which lies in the folder, before the "
            "model is loaded; its README.md shows how"
        )


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
