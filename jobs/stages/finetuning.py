"""Fine-tuning on Ray Train: data-parallel replicas of the teacher with all its replacements."""

from __future__ import annotations

import json
from typing import Any

import torch

from jobs.runtime.checkpoints import damage_note, open_checkpoints
from jobs.runtime.progress_board import RankReporter
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import run_worker_group
from jobs.stage import Stage, StageContext, WorkerContext, Workers
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import replacement_files
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import CHECKPOINTS
from ppcl.storage.mirror import download, remove, upload_on_exit
from ppcl.training.finetuning.checkpoints import is_whole_file
from ppcl.training.finetuning.plan_sampler import plan_sampler
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.finetuning.tuned_blocks import bytes_in_full
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext

NAME = "finetuning"


def workers(config: Config) -> Workers:
    return Workers(config.finetuning.data_parallel, "finetuning.data_parallel")


def check(context: StageContext) -> list[str]:
    """Refuse a plan to train in full that is not there, or that evaluation could not have in memory."""
    settings, memory = context.config.finetuning, context.config.memory
    if settings.train != "all":
        return []
    catalog = read_catalog(context.inputs["variants"].fetch().folder)
    files = replacement_files(context.inputs["students"].fetch().paths())
    variants = {name: variant.plan for name, variant in catalog.variants.items()}
    plan = plan_sampler(settings, files, variants, catalog.block_ranges).replacements
    dtype = torch.bfloat16 if context.device == "cuda" else torch.float32
    gigabytes = bytes_in_full(context.teacher, {one: files[one] for one in plan}, dtype) / 1e9
    if gigabytes > memory.replacements_gb:
        raise UserError(
            f"finetuning.train is all: the blocks and replacements of {settings.plan} take {gigabytes:.3g} GB, more "
            f"than memory.replacements_gb, {memory.replacements_gb:g}; raise it"
        )
    return []


def run(context: StageContext) -> dict[str, Any]:
    """Fine-tune the replacements for the variants; `variants`, in the info, is the digest of those.

    Checkpoints lie under `folder/checkpoints/<key>` until all is written.
    """
    folder = context.folder
    resources = Resources.of(workers(context.config), context.device, context.config)
    # The ranks look for damage, each in its share of the files: they are large.
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = {"context": context.for_workers()}
    scratch = folder / CHECKPOINTS / "ray"
    notes = run_worker_group(NAME, _rank, arguments, resources, scratch, context.events)
    download(folder)
    remove(folder / CHECKPOINTS)
    record = json.loads((folder / "finetuning.json").read_text())
    return {
        "skipped_steps": record["skipped_steps"],
        "notes": notes,
        "variants": context.inputs["variants"].digest,
    }


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    context: WorkerContext = arguments["context"]
    config, inputs = context.config, context.inputs
    catalog = read_catalog(inputs["variants"].fetch().folder)
    resumed = open_checkpoints(NAME, str(context.checkpoints), arguments["attempt"], report, is_whole_file)
    with resumed as checkpoints, upload_on_exit(context.folder) as folder:
        finetune(
            Teacher(context.teacher),
            CalibrationSet.of(inputs["calibration"]),
            DistilledReplacements(
                files=replacement_files(inputs["students"].fetch().paths()),
                variants={name: variant.plan for name, variant in catalog.variants.items()},
                sensitivity=catalog.sensitivity,
            ),
            config.finetuning,
            RunContext(
                folder=folder,
                checkpoints=checkpoints,
                seed=config.seed,
                device=context.device,
                dims=ParallelDims.join(1, config.finetuning.data_parallel),
                report=report,
                report_damaged=lambda path: report.note(damage_note(NAME, path)),
            ),
            sampling=config.sampling,
        )


def _trained(config: Config) -> str:
    return f"{config.finetuning.plan} in full" if config.finetuning.train == "all" else "replacements"


STAGE = Stage(
    name=NAME,
    run=run,
    describe=lambda context: f"{_trained(context.config)} end to end, {context.config.finetuning.steps} steps",
    depends_on=("calibration", "students", "variants"),
    reads={"students": "*.safetensors"},  # not the curves, which have times in them
    sections=("finetuning", "sampling"),
    workers=workers,
    enabled=lambda config: config.finetuning.steps > 0,
    check=check,
    resumes_from=CHECKPOINTS,
)
