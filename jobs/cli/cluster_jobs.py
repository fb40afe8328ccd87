"""Jobs on a cluster: `ppcl submit`, `status`, `logs`, `stop`, `list`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.cli.shared import CommandStopped
from ppcl.errors import UserError

if TYPE_CHECKING:  # it imports what only these commands need
    from jobs.submission import Jobs, Status

_Api = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="address of Ray's job API on the head, such as http://HEAD:8265"
    ),
]
_Id = Annotated[str | None, typer.Argument(help="the job's id; default: the last one submitted")]
_HERE = "http://127.0.0.1:8265"


def submit(
    config: Annotated[
        Path, typer.Argument(help="the job's configuration; the cluster's nodes must be able to read its paths")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distillation.steps=100"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="where to write the result: a folder that the nodes share, or s3://bucket/key")
    ] = None,
    address: _Api = _HERE,
    follow: Annotated[bool, typer.Option("--follow", help="print the job's log until it ends")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="use the ppcl installed on the cluster instead of sending this one")
    ] = False,
    env: Annotated[
        Literal["pip", "uv"] | None,
        typer.Option(
            help="let the nodes install the dependencies of ppcl, in the versions installed here, by pip or uv"
        ),
    ] = None,
) -> None:
    """Submit a compression to a cluster; submit the same configuration again to continue a stopped or failed job."""
    from jobs.submission import Jobs, absolute
    from ppcl.config.schema import load_config

    if installed and env is not None:
        raise UserError(
            f"--installed uses what the nodes have, --env {env} installs the dependencies there; leave one of them out"
        )
    settings = absolute(load_config(config, set_, output))
    jobs = Jobs(address)
    identity = jobs.submit(settings, installed, env)
    typer.echo(f"{identity}: sent to {jobs.address}, its result goes to {settings.output}")
    if follow:
        _follow(jobs, identity)
        return
    with _going_on(identity):
        begun = jobs.wait_until_begun(identity)
    _tell(begun)


def status(
    job: _Id = None,
    address: _Api = _HERE,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the progress of a job on a cluster."""
    from jobs.submission import Jobs

    found = Jobs(address).status(job)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        _tell(found)


def logs(
    job: _Id = None,
    address: _Api = _HERE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="follow the log until the job ends")] = False,
) -> None:
    """Print the log of a job on a cluster."""
    from jobs.submission import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, jobs.identity(job))
    else:
        typer.echo(jobs.logs(job), nl=False)


def stop(job: _Id = None, address: _Api = _HERE) -> None:
    """Stop a job on a cluster; submit its configuration again to continue it."""
    from jobs.submission import Jobs

    _tell(Jobs(address).stop(job))


def list_jobs(
    address: _Api = _HERE,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the jobs on a cluster."""
    from jobs.submission import Jobs

    found = Jobs(address).all()
    if json_:
        typer.echo(json.dumps([one.to_json() for one in found], indent=1))
        return
    for one in found:
        _tell(one)
    if not found:
        typer.echo(f"no ppcl jobs at {address}")


def _tell(status: Status) -> None:
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
        raise CommandStopped(
            f"the job {identity} continues; `ppcl logs {identity} -f` follows it, `ppcl stop {identity}` ends it"
        ) from None


def _follow(jobs: Jobs, identity: str) -> None:
    """A job's log until it ends."""
    with _going_on(identity):
        ended = jobs.follow(identity, lambda text: typer.echo(text, nl=False))
    if ended.state == "FAILED":
        raise UserError(f"the job {identity} failed: {ended.progress.error}")
    if ended.state != "SUCCEEDED":
        raise UserError(
            f"the job {identity} ended as {ended.state}; submitting the same configuration again continues it"
        )
