"""`ppcl plan`: what a job needs, computed from the model's structure and the job's configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.shared import out
from ppcl.config.plan_defaults import BATCH, GPUS, INTERVAL, PROMPTS
from ppcl.errors import UserError

if TYPE_CHECKING:
    from ppcl.config.schema import Config
    from ppcl.sizing import Device
    from ppcl.sizing.job import JobSize

_GPUS = ",".join(map(str, GPUS))
# Of fine-tuning, which is off by default.
_PAPERS_STEPS = 1000


def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="a published model, such as flux.2-dev or z-image (an unknown name lists all), or a pipeline's folder "
            "or URL; default: qwen-image, flux.1-dev and sd3.5-large, with --stages also the only names"
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help=f"numbers of GPUs, separated by commas; default: {_GPUS}; with --stages one"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="samples per step, over all replicas")] = BATCH,
    size: Annotated[str, typer.Option(help="size of the images, WIDTHxHEIGHT in pixels")] = "1024x1024",
    interval: Annotated[int, typer.Option(min=2, help="blocks that one student replaces")] = INTERVAL,
    stages: Annotated[
        bool, typer.Option("--stages", help="every stage of a whole job, with the default configuration or --job's")
    ] = False,
    job: Annotated[Path | None, typer.Option(help="a job's YAML file: --stages from its configuration")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=2, help=f"with --stages: number of prompts; default: the job's, or {PROMPTS}")
    ] = None,
    device: Annotated[str, typer.Option(help="kind of GPU: h100, h200, a100, l40s, rtx4090")] = "h100",
    simulate: Annotated[
        bool, typer.Option("--simulate", help="also estimate the time of a step, from a device's rates")
    ] = False,
    grow: Annotated[
        bool, typer.Option("--grow", help="--batch counts the samples of one replica: more replicas make larger steps")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="a rate of the device, such as utilisation=0.5; with --stages also a key of the job, such as "
            "distillation.steps=3000",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compute what a job needs from the model's structure: memory, bytes between ranks, and time.

    By default the distillation on several numbers of GPUs; with --stages or --job every stage of a whole job.
    """
    from ppcl.sizing import FORMULAS, layouts, whole_pipelines
    from ppcl.sizing.memory import intervals
    from ppcl.sizing.model import model_of
    from ppcl.sizing.table import table

    width, height = _size(size)
    given = set_ or []
    whole_job = stages or job is not None
    # A key of the configuration has a section before its dot, a rate has none.
    keys = [one for one in given if whole_job and "." in one.split("=")[0]]
    rates = _device(device, [one for one in given if one not in keys])
    if whole_job:
        if simulate or grow:
            raise UserError("--simulate and --grow are for the distillation alone; leave out --stages and --job")
        _stages(models, job, keys, _StageOptions(gpus, prompts, interval, (width, height), json_), rates)
        return
    if prompts is not None:
        raise UserError("--prompts is for a whole job; add --stages")
    counts = _counts(gpus or _GPUS)
    found = [model_of(name, height, width) for name in models or whole_pipelines()]
    if simulate:
        _simulate(found, counts, batch, grow, interval, rates, json_)
        return
    if grow or given:
        raise UserError("--grow and --set are for the simulation; add --simulate")
    made = [(model, list(layouts(model, intervals(model, interval), batch, counts))) for model in found]
    if json_:
        typer.echo(
            json.dumps(
                [{"model": m.name, "parameters": m.parameters, "ranks": [asdict(r) for r in rows]} for m, rows in made],
                indent=1,
            )
        )
        return
    for model, rows in made:
        out.print(table(model, rows, interval, batch, size))
    typer.echo(FORMULAS)


def _size(size: str) -> tuple[int, int]:
    """Width and height, pixels."""
    try:
        width, height = (int(n) for n in size.lower().split("x"))
        if min(width, height) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--size {size!r} is no size; give one such as 1024x1024") from None
    return width, height


def _counts(gpus: str) -> list[int]:
    try:
        counts = [int(n) for n in gpus.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--gpus {gpus!r} are no numbers of GPUs; give some such as 1,2,4,8") from None
    return counts


def _device(kind: str, overrides: Sequence[str]) -> Device:
    from ppcl.config.loading import put, validated
    from ppcl.sizing.device import Device, rates_of

    rates: dict[str, Any] = rates_of(kind)
    for override in overrides:
        put(Device, rates, override, "utilisation=0.5")
    return validated(Device, rates, "--set")


@dataclass(frozen=True)
class _StageOptions:
    """Of `ppcl plan --stages`; `size`: width and height of the images of a published model, pixels."""

    gpus: str | None
    prompts: int | None
    interval: int
    size: tuple[int, int]
    json: bool


def _stages(
    models: Sequence[str] | None, file: Path | None, overrides: list[str], options: _StageOptions, device: Device
) -> None:
    """What `ppcl plan --stages` and `ppcl plan --job` print."""
    from ppcl.sizing.fit import job_sentences
    from ppcl.sizing.stages import worker_sizes
    from ppcl.sizing.table import job_table

    made = []
    for job, count in _jobs(models, file, overrides, options, device):
        workers = worker_sizes(job)
        sentences = job_sentences(job, workers, device.size)
        record = {"model": job.model.name, "parameters": job.model.parameters, "prompts": job.prompts}
        rows = [asdict(worker) | {"device_bytes": worker.device_bytes} for worker in workers]
        made.append(record | {"workers": rows, "sentences": sentences})
        if options.json:
            continue
        on = f" on {count} GPUs" if count else ""
        out.print(
            job_table(
                f"{job.model.name}, {job.model.parameters / 1e9:.2f} billion parameters, {job.prompts} prompts, "
                f"{job.config.sampling.width} × {job.config.sampling.height}: every stage{on} ({device.name})",
                workers,
            )
        )
        for sentence in sentences:
            typer.echo(sentence)
    if options.json:
        typer.echo(json.dumps({"device": device.model_dump(), "jobs": made}, indent=1))


def _jobs(
    models: Sequence[str] | None, file: Path | None, overrides: list[str], options: _StageOptions, device: Device
) -> Iterator[tuple[JobSize, int | None]]:
    """The jobs to size, each with the number of GPUs that it is laid out on. Raises `UserError`."""
    import torch

    from ppcl.calibration.prompts import count_prompts
    from ppcl.config.schema import load_config
    from ppcl.sizing.fit import laid_out
    from ppcl.sizing.job import job_size
    from ppcl.sizing.model import TeacherSize, whole_pipelines

    if file is not None and models:
        raise UserError("give models or --job, not both: the job's file names its teacher")
    count = None
    if options.gpus is not None:
        counts = _counts(options.gpus)
        if len(counts) > 1:
            raise UserError(f"--gpus {options.gpus}: a whole job is laid out on one number of GPUs; give one")
        (count,) = counts
    configs: list[tuple[str, Config]] = []
    if file is not None:
        config = load_config(file, overrides)
        configs.append((str(config.teacher), config))
    else:
        for name in models or whole_pipelines():
            configs.append((name, default_config(overrides, options.size)))
    for name, config in configs:
        cpu = config.device == "cpu"
        sampling, precision = config.sampling, torch.float32 if cpu else torch.bfloat16
        teacher = TeacherSize.named(name, sampling.height, sampling.width, precision)
        prompts = options.prompts
        if prompts is None:
            calibration = config.calibration
            prompts = (
                count_prompts(config.prompts, calibration.prompt_column, calibration.max_prompts)
                if file is not None
                else PROMPTS
            )
        if count is not None:
            config = laid_out(config, teacher, count, options.interval)
        yield job_size(config, teacher, prompts, options.interval, device, cpu), count


def default_config(overrides: Sequence[str], size: tuple[int, int]) -> Config:
    """The default configuration with the paper's fine-tuning, images of this size, and what is overridden."""
    from ppcl.config.loading import put, validated
    from ppcl.config.schema import Config

    values: dict[str, Any] = {
        "teacher": "teacher",
        "prompts": "prompts.txt",
        "sampling": {"width": size[0], "height": size[1]},
        "finetuning": {"steps": _PAPERS_STEPS},
    }
    for override in overrides:
        put(Config, values, override, "distillation.steps=100")
    return validated(Config, values, "--set")


def _simulate(
    models: list[Any], counts: list[int], batch: int, grow: bool, interval: int, device: Any, json_: bool
) -> None:
    """What `ppcl plan --simulate` prints."""
    from ppcl.config.schema import Probes
    from ppcl.sizing.memory import intervals, longest_dividing
    from ppcl.sizing.simulation import MODEL, distillation, probes
    from ppcl.sizing.table import DISTILLATION, PROBES, step_table

    simulated = []
    for model in models:
        plan, steps, refused = intervals(model, interval), [], []
        for count in counts:
            samples = batch * (count // longest_dividing(model, plan, count)) if grow else batch
            try:
                steps.append(distillation(model, plan, samples, count, device))
            except UserError as error:
                refused.append(str(error))
        fits = [probes(model, Probes().batch_size, count, device) for count in counts]
        simulated.append({"model": model.name, "distillation": steps, "probes": fits, "refused": refused})
        if not json_:
            of_step = f"{batch} samples a step{' of one pipeline, more with replicas' if grow else ''}"
            out.print(
                step_table(
                    f"{model.name}: distillation, one student for {interval} blocks, {of_step}", steps, DISTILLATION
                )
            )
            for sentence in refused:
                typer.echo(sentence)
            out.print(step_table(f"{model.name}: probes, {Probes().batch_size} samples a step", fits, PROBES))
    if json_:
        made = [
            {
                name: [asdict(s) | {"binds": s.binds} for s in v] if name in ("distillation", "probes") else v
                for name, v in one.items()
            }
            for one in simulated
        ]
        typer.echo(json.dumps({"device": device.model_dump(), "models": made}, indent=1))
        return
    typer.echo(MODEL)
    for name, field in type(device).model_fields.items():
        typer.echo(
            f"{name:11} = {getattr(device, name):g}: {field.description}"
            if name != "name"
            else f"rates of {device.name}:"
        )
