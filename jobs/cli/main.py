"""The command line `ppcl`: its commands, and how their errors end."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from jobs.cli import architectures, cluster_jobs, compress, export, plan, results, suites
from jobs.cli.shared import CommandStopped
from ppcl import __version__
from ppcl.errors import UserError, cannot_write

_CONTINUES = "stopped; the same command continues from what is complete"


class _Commands(TyperGroup):
    """Commands whose wrong values and signals end in one sentence, as every other error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            raise UserError(error.format_message().rstrip(".")) from None
        except KeyboardInterrupt as interrupt:
            raise CommandStopped(_CONTINUES, getattr(interrupt, "exit_code", 130)) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-modal diffusion transformer into a family of smaller ones.",
)


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


# In the order of the help.
app.command()(compress.compress)
app.command()(compress.ablate)
app.command()(results.variants)
app.command()(results.generate)
app.command()(export.export)
app.command()(suites.images)
app.command()(suites.score)
app.command()(results.report)
app.command()(results.serve)
app.command()(cluster_jobs.submit)
app.command()(cluster_jobs.status)
app.command()(cluster_jobs.logs)
app.command()(cluster_jobs.stop)
app.command("list")(cluster_jobs.list_jobs)
app.command()(plan.plan)
app.command()(architectures.architectures)
app.command()(compress.config)


def main() -> None:
    """Run the command line; every error a user can cause ends in one sentence and an exit code that is not 0."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing is fetched from a hub
    try:
        app()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except CommandStopped as stopped:
        sys.exit(_fail(str(stopped), stopped.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail(_CONTINUES, 130))
    except Exception as error:
        reason = cannot_write(error)
        if reason is None:
            raise
        sys.exit(_fail(f"{reason}; free space or choose another output, then the same command continues", 2))


def _fail(sentence: str, code: int) -> int:
    Console(stderr=True).print(f"ppcl: {sentence}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
