"""`ppcl plan`: memory and traffic of a distillation, computed from the model's configuration."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.cli.shared import out
from ppcl.errors import UserError


def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="qwen-image, flux.1-dev, sd3.5-large, or a pipeline's folder or URL; default: those three"),
    ] = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs, separated by commas")] = "1,2,4,8,16,32,64",
    batch: Annotated[int, typer.Option(min=1, help="samples per step, over all replicas")] = 16,
    size: Annotated[str, typer.Option(help="size of the images, WIDTHxHEIGHT in pixels")] = "1024x1024",
    interval: Annotated[int, typer.Option(min=2, help="blocks that one student replaces")] = 4,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="also estimate the time of a step, from a device's rates")
    ] = False,
    grow: Annotated[
        bool, typer.Option("--grow", help="--batch counts the samples of one replica: more replicas make larger steps")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="with --simulate: a rate of the device, such as utilisation=0.5"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compute the memory per rank and the bytes between ranks of a distillation from the model's configuration."""
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
            f"--gpus {gpus!r}, --size {size!r}: give numbers such as 1,2,4,8 and a size such as 1024x1024"
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
