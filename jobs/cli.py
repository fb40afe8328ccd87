"""The command line: `ppcl compress`, `ablate`, `variants`, `generate`, `report`, `serve`, `config`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ppcl.errors import UserError, cannot_write


class _Stopped(Exception):
    """Ctrl-C, under a name that typer does not answer itself."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-modal diffusion transformer into a family of smaller ones.",
)
# Where there is no terminal to ask, rich takes 80 columns, into which the table of variants does not go.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


@app.command()
def compress(
    config: Annotated[Path, typer.Argument(help="the job's configuration, YAML; `ppcl config` prints the default")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distillation.steps=100")
    ] = None,
    output: Annotated[str | None, typer.Option(help="where the result goes: a folder, or s3://bucket/key")] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
) -> None:
    """Compress a diffusers pipeline; the same command again continues where it stopped."""
    from jobs.cluster import connected
    from jobs.coordinator import Job
    from ppcl.config import load_config
    from ppcl.report.terminal import summary_table

    settings = load_config(config, set_, output)
    job = Job(settings, out)
    with connected(address, settings) as device:
        report = job.run(device)
    out.print(summary_table(job.artifacts.root))
    job.reporter.say(f"report: {report}")


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="the job's configuration; its section `ablation` says how long and how often")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as ablation.seeds=5")
    ] = None,
    output: Annotated[str | None, typer.Option(help="where the job is; what it holds already is used")] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
) -> None:
    """Measure what each part of the method adds on a teacher, and other ways to choose the blocks that go."""
    from jobs.cluster import connected
    from jobs.coordinator import Job
    from ppcl.config import load_config
    from ppcl.report.terminal import ablation_table

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
    variant: Annotated[str, typer.Option(help="a name that `ppcl variants` lists, or a plan as 3-5,text:8-9,ffn:1")] = "teacher",
    output: Annotated[Path, typer.Option("--output", "-o", help="the picture to write, .png")] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: those of the job")] = None,
    teacher: Annotated[str | None, typer.Option(help="where the teacher is, if it has moved")] = None,
) -> None:
    """Make a picture with a variant."""
    import torch

    from jobs.cluster import best_device
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
        num_inference_steps=steps or sampling.steps,
        height=sampling.height,
        width=sampling.width,
        generator=torch.Generator().manual_seed(seed),
        **sampling.arguments,
    ).images[0]
    picture.save(output)
    out.print(f"{output}: {variant}, {sampling.width} × {sampling.height}, seed {seed}", highlight=False, markup=False)


@app.command()
def report(result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")]) -> None:
    """Write the report of a result anew."""
    from ppcl.artifacts import Artifacts
    from ppcl.report import write_report

    artifacts = Artifacts(result)
    artifacts.manifest()
    typer.echo(f"{artifacts.place}/{write_report(result).name}")


@app.command()
def serve(
    result: Annotated[Path, typer.Argument(help="folder written by ppcl compress")],
    host: Annotated[str | None, typer.Option(help="address to listen at; default: http.host")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen at; default: http.port")] = None,
    config: Annotated[Path | None, typer.Option(help="settings, YAML; `ppcl config --serve` prints the default")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as engine.batch=4")
    ] = None,
) -> None:
    """Serve the variants of a result behind the OpenAI Images API, with a page to try them on."""
    from serve.config import load_settings
    from serve.local import run

    run(load_settings(result, config, set_, {"host": host, "port": port}), lambda text: out.print(text, highlight=False, markup=False))


@app.command()
def config(
    serve: Annotated[bool, typer.Option("--serve", help="that of ppcl serve instead of a job's")] = False,
) -> None:
    """Print the full default configuration, every key described."""
    if serve:
        from serve.config import commented_defaults
    else:
        from ppcl.config import commented_defaults

    typer.echo(commented_defaults(), nl=False)


def main() -> None:
    """Run the command line; every error a user can cause ends in one sentence and an exit code that is not 0."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing is fetched from a hub
    try:
        app()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except (_Stopped, KeyboardInterrupt):
        sys.exit(_fail("stopped; the same command continues from what is complete", 130))
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
