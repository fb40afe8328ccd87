"""`ppcl compress`, `ppcl ablate` and the configuration they take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.shared import out


def compress(
    config: Annotated[Path, typer.Argument(help="the job's configuration, YAML; `ppcl config` prints the default")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distillation.steps=100"),
    ] = None,
    output: Annotated[str | None, typer.Option(help="where to write the result: a folder, or s3://bucket/key")] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
    memory_check: Annotated[
        bool, typer.Option(help="refuse at the start what the devices' memory cannot hold, by ppcl plan's estimate")
    ] = True,
) -> None:
    """Compress a diffusers pipeline; run the same command again to continue a stopped job."""
    from jobs.pipeline import Job
    from jobs.runtime.cluster import connected
    from jobs.runtime.stopping import stop_signals
    from ppcl.config.schema import load_config
    from ppcl.report.benchmarks import benchmark_records
    from ppcl.report.terminal import benchmark_tables, next_steps, summary_table
    from ppcl.storage.results import read_results

    with stop_signals():
        settings = load_config(config, set_, output)
        job = Job(settings, out)
        with connected(address, settings) as device:
            report = job.run(device, check_memory=memory_check)
    out.print(summary_table(job.artifacts.root))
    for table in benchmark_tables(benchmark_records(read_results(job.artifacts.root))):
        out.print(table)
    job.reporter.say(f"report: {report}")
    for line in next_steps(job.artifacts.root, job.artifacts.place):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def ablate(
    config: Annotated[
        Path, typer.Argument(help="the job's configuration; its section `ablation` sets steps and seeds")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as ablation.seeds=5")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="output of the job; stages that are complete there are used")
    ] = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; default: an embedded local one")] = None,
) -> None:
    """Measure the gain of each part of the method, and compare other ways to choose the blocks to remove."""
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


def config(
    serve: Annotated[
        bool, typer.Option("--serve", help="print the configuration of ppcl serve instead of a job's")
    ] = False,
) -> None:
    """Print the full default configuration with a description of every key."""
    if serve:
        from serve.config import commented_defaults
    else:
        from ppcl.config.schema import commented_defaults

    typer.echo(commented_defaults(), nl=False)
