"""The command line: `ppcl compress`, `ablate`, `variants`, `generate`, `report`, `serve`, `plan`, `config`, and for jobs on a
cluster `submit`, `status`, `logs`, `stop`, `list`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ppcl import __version__
from ppcl.errors import UserError, cannot_write

_CONTINUES = "stopped; the same command continues from what is complete"


class _Stopped(Exception):
    """Ctrl-C or SIGTERM, under a name that typer does not answer itself, and with what it means."""

    def __init__(self, sentence: str, exit_code: int = 130):
        super().__init__(sentence)
        self.exit_code = exit_code


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Stopped(_CONTINUES, getattr(interrupt, "exit_code", 130)) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-modal diffusion transformer into a family of smaller ones.",
)
# Where there is no terminal to ask, rich takes 80 columns, into which the table of variants does not go.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ppcl {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Turn a multi-modal diffusion transformer into a family of smaller ones."""


@app.command()
def compress(
    config: Annotated[Path, typer.Argument(help="the job's configuration, YAML; `ppcl config` prints the default")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distillation.steps=100"),
    ] = None,
    output: Annotated[str | None, typer.Option(help="where the result goes: a folder, or s3://bucket/key")] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
) -> None:
    """Compress a diffusers pipeline; the same command again continues where it stopped."""
    from jobs.pipeline import Job
    from jobs.runtime.cluster import connected
    from jobs.runtime.stopping import stop_signals
    from ppcl.config.schema import load_config
    from ppcl.report.terminal import next_steps, summary_table

    with stop_signals():
        settings = load_config(config, set_, output)
        job = Job(settings, out)
        with connected(address, settings) as device:
            report = job.run(device)
    out.print(summary_table(job.artifacts.root))
    job.reporter.say(f"report: {report}")
    for line in next_steps(job.artifacts.root, job.artifacts.place):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def ablate(
    config: Annotated[
        Path, typer.Argument(help="the job's configuration; its section `ablation` says how long and how often")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as ablation.seeds=5")
    ] = None,
    output: Annotated[str | None, typer.Option(help="where the job is; what it holds already is used")] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
) -> None:
    """Measure what each part of the method adds on a teacher, and other ways to choose the blocks that go."""
    from jobs.pipeline import Job
    from jobs.runtime.cluster import connected
    from jobs.runtime.stopping import stop_signals
    from ppcl.config.schema import load_config
    from ppcl.report.terminal import ablation_table

    with stop_signals():
        settings = load_config(config, set_, output)
        job = Job(settings, out)
        with connected(address, settings) as device:
            report = job.run(device, ablation=True)
    out.print(ablation_table(job.artifacts.root))
    job.reporter.say(f"report: {report}")


@app.command()
def variants(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the variants of a result."""
    from ppcl.report import summary_rows
    from ppcl.report.terminal import summary_table
    from ppcl.result import Result

    Result(result)  # verifies what the variants are made of
    if json_:
        typer.echo(json.dumps(summary_rows(result), indent=1))
    else:
        out.print(summary_table(result))


@app.command()
def generate(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    prompt: Annotated[str, typer.Argument(help="what the picture shows")],
    variant: Annotated[
        str, typer.Option(help="a name that `ppcl variants` lists, or a plan as 3-5,text:8-9,ffn:1")
    ] = "teacher",
    output: Annotated[Path, typer.Option("--output", "-o", help="the picture to write, .png")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: those of the job")] = None,
    teacher: Annotated[str | None, typer.Option(help="where the teacher is, if it has moved")] = None,
) -> None:
    """Make a picture with a variant."""
    import torch

    from jobs.runtime.cluster import best_device
    from ppcl.result import Result

    if not prompt.strip():
        raise UserError("the prompt is empty; say what the picture shows")
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"the output {output} is no picture's name; end it in .png, .jpg or .webp")
    if not output.absolute().parent.is_dir():
        raise UserError(f"the folder {output.absolute().parent} does not exist; make it or choose another --output")
    opened = Result(result, teacher=teacher)
    pipeline = opened.pipeline(variant, device=best_device())
    sampling = opened.sampling
    picture = pipeline(
        prompt,
        num_inference_steps=sampling.steps if steps is None else steps,
        height=sampling.height,
        width=sampling.width,
        generator=torch.Generator().manual_seed(seed),
        **sampling.arguments,
    ).images[0]
    picture.save(output)
    out.print(f"{output}: {variant}, {sampling.width} × {sampling.height}, seed {seed}", highlight=False, markup=False)


@app.command()
def report(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
) -> None:
    """Write the report of a result anew."""
    from ppcl.report import write_report
    from ppcl.storage.manifest import Artifacts

    artifacts = Artifacts(result)
    artifacts.manifest()
    typer.echo(f"{artifacts.place}/{write_report(result).name}")


@app.command()
def serve(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    host: Annotated[str | None, typer.Option(help="address to listen at; default: http.host")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen at; default: http.port")] = None,
    config: Annotated[
        Path | None, typer.Option(help="settings, YAML; `ppcl config --serve` prints the default")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as engine.batch=4")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no line for each request")] = False,
) -> None:
    """Serve the variants of a result behind the OpenAI Images API, with a page to try them on."""
    from serve.config import load_settings
    from serve.local_server import run

    # Lines of requests come from a thread of their own, also while others' output is held back.
    terminal = sys.stdout

    def say(text: str) -> None:
        print(text, file=terminal, flush=True)

    settings = load_settings(result, config, set_, {"host": host, "port": port})
    try:
        run(settings, say, quiet)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


_Api = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray's job API, the head's dashboard, such as http://HEAD:8265"),
]
_Id = Annotated[str | None, typer.Argument(help="the job's id; default: the last that was sent")]
_HERE = "http://127.0.0.1:8265"


@app.command()
def submit(
    config: Annotated[
        Path, typer.Argument(help="the job's configuration; what it names must be in reach of the cluster's nodes")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distillation.steps=100"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="where the result goes: a folder that the nodes share, or s3://bucket/key")
    ] = None,
    address: _Api = _HERE,
    follow: Annotated[bool, typer.Option("--follow", help="print the job's log until it ends")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="use the ppcl installed on the cluster instead of sending this one")
    ] = False,
) -> None:
    """Send a compression to a cluster; the same configuration again continues one that was stopped or failed."""
    from jobs.submission import Jobs, absolute
    from ppcl.config.schema import load_config

    settings = absolute(load_config(config, set_, output))
    jobs = Jobs(address)
    identity = jobs.submit(settings, installed)
    typer.echo(f"{identity}: sent to {jobs.address}, its result goes to {settings.output}")
    if follow:
        _follow(jobs, identity)
        return
    with _going_on(identity):
        begun = jobs.wait_until_begun(identity)
    _tell(begun)


@app.command()
def status(
    job: _Id = None,
    address: _Api = _HERE,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """How far a job on a cluster is."""
    from jobs.submission import Jobs

    found = Jobs(address).status(job)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        _tell(found)


@app.command()
def logs(
    job: _Id = None,
    address: _Api = _HERE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job ends")] = False,
) -> None:
    """What a job on a cluster has said."""
    from jobs.submission import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, jobs.identity(job))
    else:
        typer.echo(jobs.logs(job), nl=False)


@app.command()
def stop(job: _Id = None, address: _Api = _HERE) -> None:
    """Stop a job on a cluster; submitting its configuration again continues it."""
    from jobs.submission import Jobs

    _tell(Jobs(address).stop(job))


@app.command("list")
def list_(
    address: _Api = _HERE,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The jobs of a cluster."""
    from jobs.submission import Jobs

    found = Jobs(address).all()
    if json_:
        typer.echo(json.dumps([one.to_json() for one in found], indent=1))
        return
    for one in found:
        _tell(one)
    if not found:
        typer.echo(f"no jobs of ppcl at {address}")


def _tell(status: Any) -> None:
    """One line about a job."""
    from jobs.progress import duration

    progress, parts = status.progress, [f"{status.id}: {status.state}"]
    if progress.stage:
        stage = f"{progress.stage}: {progress.phase}" if progress.phase else progress.stage
        parts.append(f"{stage} {progress.done} of {progress.total}" if progress.total else stage)
    if progress.index:
        parts.append(f"stage {progress.index} of {progress.stages}")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if progress.loss is not None:
        parts.append(f"mean loss {progress.loss:.4f}")
    parts.append(f"report: {progress.report}" if progress.report else f"output: {status.output}")
    if progress.error:
        parts.append(progress.error)
    typer.echo(", ".join(parts))


@contextmanager
def _going_on(identity: str) -> Iterator[None]:
    """Ctrl-C ends the looking on alone."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Stopped(
            f"the job {identity} goes on; `ppcl logs {identity} -f` follows it, `ppcl stop {identity}` ends it"
        ) from None


def _follow(jobs: Any, identity: str) -> None:
    """A job's log until it ends."""
    with _going_on(identity):
        ended = jobs.follow(identity, lambda text: typer.echo(text, nl=False))
    if ended.state == "FAILED":
        raise UserError(f"the job {identity} failed: {ended.progress.error}")
    if ended.state != "SUCCEEDED":
        raise UserError(
            f"the job {identity} ended as {ended.state}; submitting the same configuration again continues it"
        )


@app.command()
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="qwen-image, flux.1-dev, sd3.5-large, or a pipeline's folder or URL; default: those three"),
    ] = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs, with commas")] = "1,2,4,8,16,32,64",
    batch: Annotated[int, typer.Option(min=1, help="samples a step, over all replicas")] = 16,
    size: Annotated[str, typer.Option(help="of the pictures, WIDTHxHEIGHT in pixels")] = "1024x1024",
    interval: Annotated[int, typer.Option(min=2, help="blocks that one student stands for")] = 4,
    simulate: Annotated[bool, typer.Option("--simulate", help="how long steps take, too, by a device's rates")] = False,
    grow: Annotated[
        bool, typer.Option("--grow", help="--batch is of one pipeline: a step has more samples with more replicas")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="with --simulate: a rate of the device, such as utilisation=0.5"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Memory a rank and bytes between ranks of a distillation, computed from the model's configuration."""
    from dataclasses import asdict

    from ppcl.config.loading import put, validated
    from ppcl.sizing import FORMULAS, Device, layouts, published
    from ppcl.sizing.memory import intervals
    from ppcl.sizing.model import model_of
    from ppcl.sizing.table import table

    try:
        counts = [int(n) for n in gpus.split(",")]
        width, height = (int(n) for n in size.lower().split("x"))
        if min(*counts, width, height, 1) < 1:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--gpus {gpus!r}, --size {size!r}: numbers such as 1,2,4,8 and a size such as 1024x1024 are wanted"
        ) from None
    rates: dict[str, Any] = {}
    for override in set_ or []:
        put(Device, rates, override, "utilisation=0.5")
    device = validated(Device, rates, "--set")
    found = [model_of(name, height, width) for name in models or published()]
    if simulate:
        _simulate(found, counts, batch, grow, interval, device, json_)
        return
    if grow or rates:
        raise UserError("--grow and --set are for the simulation; add --simulate")
    made = {model: list(layouts(model, intervals(model, interval), batch, counts)) for model in found}
    if json_:
        typer.echo(
            json.dumps(
                [
                    {"model": m.name, "parameters": m.parameters, "ranks": [asdict(r) for r in rows]}
                    for m, rows in made.items()
                ],
                indent=1,
            )
        )
        return
    for model, rows in made.items():
        out.print(table(model, rows, interval, batch, size))
    typer.echo(FORMULAS)


def _simulate(
    models: list[Any], counts: list[int], batch: int, grow: bool, interval: int, device: Any, json_: bool
) -> None:
    """What `ppcl plan --simulate` prints."""
    from dataclasses import asdict

    from ppcl.config.schema import Probes
    from ppcl.sizing.memory import intervals, longest_dividing
    from ppcl.sizing.simulation import MODEL, distillation, probes
    from ppcl.sizing.table import DISTILLATION, PROBES, step_table

    told = []
    for model in models:
        plan, steps, refused = intervals(model, interval), [], []
        for count in counts:
            samples = batch * (count // longest_dividing(model, plan, count)) if grow else batch
            try:
                steps.append(distillation(model, plan, samples, count, device))
            except UserError as error:
                refused.append(str(error))
        fits = [probes(model, Probes().batch_size, count, device) for count in counts]
        told.append({"model": model.name, "distillation": steps, "probes": fits, "refused": refused})
        if not json_:
            samples = f"{batch} samples a step{' of one pipeline, more with replicas' if grow else ''}"
            out.print(
                step_table(
                    f"{model.name}: distillation, one student for {interval} blocks, {samples}", steps, DISTILLATION
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
            for one in told
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


@app.command()
def config(
    serve: Annotated[bool, typer.Option("--serve", help="that of ppcl serve instead of a job's")] = False,
) -> None:
    """Print the full default configuration, every key described."""
    if serve:
        from serve.config import commented_defaults
    else:
        from ppcl.config.schema import commented_defaults

    typer.echo(commented_defaults(), nl=False)


def main() -> None:
    """Run the command line; every error a user can cause ends in one sentence and an exit code that is not 0."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing is fetched from a hub
    try:
        app()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except _Stopped as stopped:
        sys.exit(_fail(str(stopped), stopped.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail(_CONTINUES, 130))
    except Exception as error:
        told = cannot_write(error)
        if told is None:
            raise
        sys.exit(_fail(f"{told}; free space or choose another output, then the same command continues", 2))


def _fail(sentence: str, code: int) -> int:
    Console(stderr=True).print(f"ppcl: {sentence}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
