"""`ppcl architectures`: the families of transformers that ppcl knows."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def architectures(json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the supported transformers: pipelines, block lists, kinds of replacement, what is tested and what is not."""
    from ppcl.models.architectures import LEFT_OUT, architectures

    rows = architectures()
    if json_:
        typer.echo(json.dumps({"supported": [row.as_json() for row in rows], "left_out": LEFT_OUT}, indent=1))
        return
    for row in rows:
        typer.echo(f"{row.family}: {row.transformer}")
        typer.echo(f"  pipelines    {', '.join(row.pipelines)}")
        typer.echo(f"  block lists  {', '.join(row.block_lists)}")
        typer.echo(f"  depth        {'yes' if row.depth else 'no'}")
        typer.echo(f"  widths       {', '.join(row.widths) or 'none'}")
        typer.echo(f"  jobs         {', '.join(row.jobs) or 'none'}")
        for part, what in row.tested.items():
            typer.echo(f"  tested       {part}: {what}")
        for part, why in row.limits.items():
            typer.echo(f"  not          {part}: {why}")
    for transformer, why in LEFT_OUT.items():
        typer.echo(f"left out: {transformer}: {why}")
