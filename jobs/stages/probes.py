"""Probes on Ray Train: every rank fits its own blocks."""

from __future__ import annotations

from typing import Any

from jobs.runtime.progress_board import RankReporter
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import run_worker_group
from jobs.stage import Stage, StageContext, WorkerContext, Workers
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.detection.fit_probes import dropped, fit_probes, underdetermined
from ppcl.models.teacher import Teacher
from ppcl.storage.mirror import download, upload_on_exit
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext


def workers(config: Config) -> Workers:
    return Workers(config.probes.workers, "probes.workers")


def run(context: StageContext) -> dict[str, Any]:
    """Fit the probes of all blocks; progress counts samples.

    `dropped`: calibration tokens left out for NaN or Inf, at the block that lost most. `notes`: what the user should
    know.
    """
    folder = context.folder
    resources = Resources.of(workers(context.config), context.device, context.config)
    arguments = {"context": context.for_workers()}
    run_worker_group("probes", _rank, arguments, resources, folder / "ray", context.events)
    download(folder)
    files = sorted(folder.glob("block-*.safetensors"))
    token_counts = [tokens for tokens in map(underdetermined, files) if tokens is not None]
    notes = []
    if token_counts:
        notes.append(
            f"probes: {len(token_counts)} of {len(files)} blocks had only {min(token_counts)} calibration tokens of a "
            "stream, no more than its width, so the ridge dominates their fit; use more prompts or a larger "
            "calibration.states_per_prompt"
        )
    return {"blocks": len(files), "dropped": max(map(dropped, files)), "notes": notes}


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    context: WorkerContext = arguments["context"]
    config = context.config
    with upload_on_exit(context.folder) as folder:
        fit_probes(
            Teacher(context.teacher),
            CalibrationSet.of(context.inputs["calibration"]),
            config.probes,
            RunContext(
                folder=folder,
                checkpoints=context.checkpoints,
                seed=config.seed,
                device=context.device,
                dims=ParallelDims.join(config.probes.workers, 1),
                report=report,
            ),
            config.detection.tokens,
            _fit_tokens(config),
        )


def _fit_tokens(config: Config) -> int:
    """How many tokens the closed forms of intervals are fitted on."""
    return config.detection.fit_tokens if config.detection.method == "measured" else 0


STAGE = Stage(
    name="probes",
    run=run,
    describe=lambda context: "one affine map a block and stream, in closed form",
    depends_on=("calibration",),
    sections=("probes",),
    workers=workers,
    # It keeps as many tokens as detection compares and fits on.
    also_reads=lambda context: [context.config.detection.tokens, _fit_tokens(context.config)],
)
