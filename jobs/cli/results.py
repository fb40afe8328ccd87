"""What is done with the result of a job: `ppcl variants`, `generate`, `report`, `serve`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.shared import lora_choice, out
from ppcl.config.offload import Offload
from ppcl.errors import UserError


def variants(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the variants of a result."""
    from ppcl.report import summary_rows
    from ppcl.report.benchmarks import benchmark_records
    from ppcl.report.terminal import benchmark_tables, summary_table
    from ppcl.result import Result
    from ppcl.storage.results import read_results

    Result(result)  # verifies what the variants are made of
    if json_:
        typer.echo(json.dumps(summary_rows(result), indent=1))
    else:
        out.print(summary_table(result))
        for table in benchmark_tables(benchmark_records(read_results(result))):
            out.print(table)


def generate(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    prompt: Annotated[str, typer.Argument(help="what the image shows")],
    variant: Annotated[
        str, typer.Option(help="a name that `ppcl variants` lists, or a plan such as 3-5,text:8-9,ffn:1")
    ] = "teacher",
    output: Annotated[Path, typer.Option("--output", "-o", help="image file to write: .png, .jpg or .webp")] = Path(
        "out.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="seed of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: those of the job")] = None,
    lora: Annotated[str | None, typer.Option(help="a LoRA of the teacher to put on, a .safetensors file")] = None,
    lora_scale: Annotated[float, typer.Option(help="how strongly it is on, times what it was trained to")] = 1.0,
    lora_transfer: Annotated[
        bool, typer.Option("--lora-transfer", help="have students take what the LoRA changes in blocks they replace")
    ] = False,
    teacher: Annotated[str | None, typer.Option(help="path of the teacher, if it has moved")] = None,
    offload: Annotated[
        Offload | None,
        typer.Option(help="weights on the device at once: all, a component's, a block's; auto, the default: what fits"),
    ] = None,
) -> None:
    """Generate an image with a variant."""
    import torch

    from jobs.runtime.cluster import best_device
    from ppcl.models.placement import Images
    from ppcl.result import Result

    if not prompt.strip():
        raise UserError("the prompt is empty; describe the image")
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"the output {output} is not an image file; use a name that ends in .png, .jpg or .webp")
    if not output.absolute().parent.is_dir():
        raise UserError(f"the folder {output.absolute().parent} does not exist; make it or choose another --output")
    opened = Result(result, teacher=teacher, memory={"offload": offload} if offload else None)
    sampling = opened.sampling
    sigmas = sampling.arguments.get("sigmas")
    if steps is not None and sigmas is not None and steps != len(sigmas):
        raise UserError(
            f"--steps is {steps}, and the job's sampling.arguments.sigmas are for {len(sigmas)}; leave it out"
        )
    images = Images(1, sampling.height, sampling.width)
    device = best_device()
    # As in a job.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chosen = lora_choice(lora, lora_scale, lora_transfer)
    pipeline, placement = opened.placed_pipeline(variant, device, dtype, images, chosen, lora_transfer)
    if chosen:
        told = f"{lora}: {opened.coverage(pipeline, variant, chosen, lora_transfer)}"
        out.print(told, highlight=False, markup=False, soft_wrap=True)
    if placement.mode != "none":
        out.print(str(placement), highlight=False, markup=False)
    picture = pipeline(
        prompt,
        num_inference_steps=sampling.steps if steps is None else steps,
        height=sampling.height,
        width=sampling.width,
        generator=torch.Generator().manual_seed(seed),
        **sampling.arguments,
    ).images[0]
    picture.save(output)
    out.print(f"{output}: {variant}, {picture.width} × {picture.height}, seed {seed}", highlight=False, markup=False)


def report(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
) -> None:
    """Write the report of a result again."""
    from ppcl.report import write_report
    from ppcl.storage.manifest import Artifacts

    artifacts = Artifacts(result)
    artifacts.manifest()
    typer.echo(f"{artifacts.place}/{write_report(result).name}")


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
    quiet: Annotated[bool, typer.Option("--quiet", help="print no line per request")] = False,
) -> None:
    """Serve the variants of a result behind the OpenAI Images API, with a playground page."""
    from serve.config import load_settings
    from serve.local_server import run

    # Another thread prints the lines of requests, also while other output is held back.
    terminal = sys.stdout

    def say(text: str) -> None:
        print(text, file=terminal, flush=True)

    settings = load_settings(result, config, set_, {"host": host, "port": port})
    try:
        run(settings, say, quiet)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
