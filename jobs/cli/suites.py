"""Images of a suite for scorers elsewhere (`ppcl images`), and the way back of their scores (`ppcl score`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli.progress_lines import ProgressLines
from jobs.cli.shared import out
from ppcl.config.checks import BENCHMARK_NAME
from ppcl.config.location import Location
from ppcl.config.offload import Offload
from ppcl.errors import UserError


def images(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    suite: Annotated[str, typer.Option(help="prompts, JSON lines with prompt, and if you like id and category")],
    to: Annotated[str, typer.Option(help="folder to write into; images that are there from before stay")],
    variant: Annotated[
        list[str] | None, typer.Option(help="a variant or a plan; again for another; default: all variants")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="images of each prompt, of seeds in a row")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="seed of the first image of each prompt")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="images at once")] = 4,
    teacher: Annotated[str | None, typer.Option(help="path of the teacher, if it has moved")] = None,
    offload: Annotated[
        Offload | None,
        typer.Option(help="weights on the device at once: all, a component's, a block's; auto, the default: what fits"),
    ] = None,
) -> None:
    """Generate the images of a suite with every variant, for scorers elsewhere; `pictures.jsonl` lists them."""
    import torch

    from jobs.runtime.cluster import best_device
    from ppcl.evaluation.picture_list import PICTURES, SuiteRun, draw_suite
    from ppcl.evaluation.suites import read_suite
    from ppcl.models.placement import Images
    from ppcl.result import Result
    from ppcl.search.variants import TEACHER
    from ppcl.storage.mirror import local_file
    from ppcl.storage.node_cache import file_sha256
    from ppcl.storage.results import made_of

    folder = _folder_here(to, "--to")
    prompts = read_suite(suite, Path(suite).stem)
    opened = Result(result, teacher=teacher, memory={"offload": offload} if offload else None)
    # By folder; the teacher, too, with which every other is compared.
    chosen = {_folder(name): name for name in (TEACHER, *(variant or opened.variants))}
    plans = {folder: str(opened.variant(name).plan) for folder, name in chosen.items()}
    sampling = opened.sampling
    run = SuiteRun(
        suite=Path(suite).stem,
        suite_sha256=file_sha256(local_file(suite)),
        made_of=made_of(opened.artifacts),
        plans=plans,
        seed=seed,
        images_per_prompt=images_per_prompt,
        sampling=sampling.model_dump(mode="json"),
    )
    run.claim(folder)
    device = best_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline: list[Any] = []

    def pipeline_of(name: str) -> Any:
        """Made when the first image is to be drawn."""
        if not pipeline:
            at_once = Images(batch_size, sampling.height, sampling.width)
            made, placement = opened.placed_pipeline(TEACHER, device, dtype, at_once)
            pipeline.append(made)
            if placement.mode != "none":
                out.print(str(placement), highlight=False, markup=False)
        opened.switch(pipeline[0], chosen[name])
        return pipeline[0]

    with ProgressLines("images drawn") as progress:
        drawn = draw_suite(run, prompts, folder, pipeline_of, batch_size, progress)
    told = f"{folder / PICTURES}: {len(drawn)} images of {len(prompts)} prompts, {len(plans)} variants with the teacher"
    out.print(told, highlight=False, markup=False, soft_wrap=True)
    back = f"give scores back: ppcl score {result} --images {to} --from SCORES.jsonl --name NAME"
    out.print(back, highlight=False, markup=False, soft_wrap=True)


def _folder(variant: str) -> str:
    """A folder's name for a variant or a plan."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", variant)


def _folder_here(place: str, option: str) -> Path:
    """A folder of this machine. Raises `UserError` for a URL."""
    location = Location.of(place)
    if location.is_url:
        raise UserError(f"{option} is {place}: harnesses read images from a disk; give a folder of this machine")
    return location.path


def score(
    result: Annotated[str, typer.Argument(help="what ppcl compress wrote: a folder, or s3://bucket/key")],
    from_: Annotated[
        str, typer.Option("--from", help="JSON lines with file, as pictures.jsonl names the image, and score")
    ],
    images: Annotated[str, typer.Option(help="the folder that ppcl images wrote")],
    name: Annotated[str, typer.Option(help="what the score is called, such as geneval2")],
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="the score is a distance")] = False,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="level of the intervals")] = 0.95,
) -> None:
    """Take scores of the images that `ppcl images` drew: into the report, the model cards, and for `elastic.score`."""
    from ppcl.evaluation.picture_list import SuiteRun, foreign_benchmark, read_pictures
    from ppcl.report import write_report
    from ppcl.report.terminal import benchmark_tables
    from ppcl.storage.manifest import Artifacts
    from ppcl.storage.results import made_of, save_given_scores

    if not BENCHMARK_NAME.fullmatch(name):
        raise UserError(f"--name {name!r} is no name; use letters, digits, '.', '_' and '-'")
    artifacts, folder = Artifacts(result), _folder_here(images, "--images")
    artifacts.manifest()
    run, pictures = SuiteRun.read(folder), read_pictures(folder)
    if {run.made_of, *(picture.made_of for picture in pictures)} != {made_of(artifacts)}:
        raise UserError(
            f"the images in {images} are of another result than {artifacts.place}, or of an earlier state of it; draw "
            "them again with ppcl images"
        )
    benchmark = foreign_benchmark(name, run.suite, from_, pictures, not lower_is_better)
    record = benchmark.record(confidence, run.seed)
    with artifacts.exclusive_lock():
        save_given_scores(artifacts, name, {"benchmark": record, "plans": run.plans})
    for table in benchmark_tables([record]):
        out.print(table)
    write_report(result)
    taken = f"{name}: {record['prompts']} prompts, {len(record['variants'])} variants; the report has them"
    out.print(taken, highlight=False, markup=False, soft_wrap=True)
