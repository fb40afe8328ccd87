"""Images of a suite for scorers elsewhere, and the scores that they give back.

`pictures.jsonl` lists the images of all variants, one a line, with what a harness needs (`id`, `prompt`, `category`,
`image_path`, `reference_image_path`, every column of the suite) and what ties a score to the image it is of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.config.location import LocationLike
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.evaluation.benchmarks import Benchmark
from ppcl.evaluation.images import generate_images, save_images
from ppcl.evaluation.prompt_checker import TestPrompt
from ppcl.evaluation.suites import json_lines
from ppcl.search.variants import TEACHER
from ppcl.storage.manifest import write_atomically
from ppcl.storage.node_cache import file_sha256

PICTURES, RUN = "pictures.jsonl", "run.json"


@dataclass(frozen=True)
class Picture:
    """One image. `file`: beside `pictures.jsonl`. `made_of`: the digest of the weights of its result."""

    file: str
    variant: str
    id: str
    prompt: str
    category: str | None
    seed: int
    sha256: str
    made_of: str
    row: Mapping[str, Any]

    def line(self, folder: Path) -> str:
        """With absolute paths, as harnesses want them, and the suite's columns where they have no other meaning."""
        own = {
            "file": self.file,
            "variant": self.variant,
            "id": self.id,
            "prompt": self.prompt,
            "category": self.category,
            "seed": self.seed,
            "image_path": str(folder / self.file),
            "reference_image_path": str(folder / TEACHER / Path(self.file).name),
            "sha256": self.sha256,
            "made_of": self.made_of,
        }
        return json.dumps({**self.row, **own}, ensure_ascii=False) + "\n"

    @classmethod
    def of_line(cls, row: dict[str, Any], where: str) -> Picture:
        """Raises `UserError` for a line that `line` did not make."""
        names = ("file", "variant", "id", "prompt", "category", "seed", "sha256", "made_of")
        if missing := [name for name in names if name not in row]:
            raise UserError(f"{where} has no {missing[0]!r}: ppcl images did not write it; draw the images again")
        return cls(**{name: row[name] for name in names}, row=row)


@dataclass(frozen=True)
class SuiteRun:
    """What the images of a folder are of: two runs into one folder must agree.

    `plans`: by variant, in text. `made_of`: see `Picture`.
    """

    suite: str
    suite_sha256: str
    made_of: str
    plans: Mapping[str, str]
    seed: int
    images_per_prompt: int
    sampling: Mapping[str, Any]

    def claim(self, folder: Path) -> None:
        """Write it down. Raises `UserError` where the folder holds something else."""
        path = folder / RUN
        record = json.dumps(self.__dict__, indent=1, sort_keys=True)
        if path.is_file():
            if path.read_text() != record:
                raise UserError(
                    f"{folder} holds images of another suite, result, seed or choice of variants; choose another --to"
                )
            return
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"the folder {folder} is not empty and holds no images of ppcl; choose another --to")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, record)

    @classmethod
    def read(cls, folder: LocationLike) -> SuiteRun:
        path = Path(str(folder)) / RUN
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {RUN}; give the folder that ppcl images wrote") from None
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged; draw the images again with ppcl images") from None


def draw_suite(
    run: SuiteRun,
    prompts: Sequence[TestPrompt],
    folder: Path,
    pipeline_of: Callable[[str], Any],
    batch: int,
    progress: Callable[[int, int], None],
) -> list[Picture]:
    """Draw every prompt with every variant, from the same seeds, into `folder/VARIANT/`; images that are there stay.

    `pipeline_of(variant)`: the pipeline, switched to it. Writes `pictures.jsonl` at the end.
    """
    jobs = [(prompt, run.seed + number) for prompt in prompts for number in range(run.images_per_prompt)]
    names = [f"{index:05d}.png" for index in range(len(jobs))]
    sampling = Sampling.model_validate(dict(run.sampling))
    done, total = 0, len(jobs) * len(run.plans)
    for variant in run.plans:
        missing = [index for index, name in enumerate(names) if not (folder / variant / name).exists()]
        done += len(jobs) - len(missing)
        progress(done, total)
        pipeline = pipeline_of(variant) if missing else None
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            texts, seeds = [jobs[i][0].text for i in some], [jobs[i][1] for i in some]
            images = generate_images(pipeline, texts, seeds, sampling)
            save_images(images, [folder / variant / names[i] for i in some])
            done += len(some)
            progress(done, total)
    pictures = list(_pictures(run, jobs, names, folder))
    write_atomically(folder / PICTURES, "".join(picture.line(folder.absolute()) for picture in pictures))
    return pictures


def _pictures(
    run: SuiteRun, jobs: Sequence[tuple[TestPrompt, int]], names: Sequence[str], folder: Path
) -> Iterator[Picture]:
    for variant in run.plans:
        for name, (prompt, seed) in zip(names, jobs, strict=True):
            yield Picture(
                file=f"{variant}/{name}",
                variant=variant,
                id=prompt.row["id"],
                prompt=prompt.text,
                category=prompt.category,
                seed=seed,
                sha256=file_sha256(folder / variant / name),
                made_of=run.made_of,
                row=prompt.row,
            )


def read_pictures(folder: LocationLike) -> list[Picture]:
    """The images of a folder that `draw_suite` filled. Raises `UserError` where one was changed since."""
    root = Path(str(folder))
    if not (root / PICTURES).is_file():
        raise UserError(f"{folder} holds no {PICTURES}; give the folder that ppcl images wrote, once it is done")
    pictures = [
        Picture.of_line(row, f"{root / PICTURES}, line {number}")
        for number, row in json_lines(root / PICTURES, "the list of images")
    ]
    for picture in pictures:
        path = root / picture.file
        if not path.is_file() or file_sha256(path) != picture.sha256:
            raise UserError(f"{path} is not the image that was drawn; draw the images again into a new folder")
    return pictures


def foreign_scores(scores: LocationLike, pictures: Sequence[Picture]) -> dict[str, dict[str, np.ndarray]]:
    """By variant and category, the scores of a file, one a prompt: the mean of its images, which are no independent
    draws.

    `scores`: JSON lines with `score`, a number or a boolean, and the image it is of: `file` as `pictures.jsonl` has it,
    or `image_path`; `sha256`, where a line has it, must be the image's. Every image of a variant has one, or none has.
    Raises `UserError` for images that are not of the list, and for scores that are none.
    """
    given = _given(scores, pictures)
    by_variant: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_variant.setdefault(picture.variant, []).append(picture)
    scored = {name: some for name, some in by_variant.items() if any(picture.file in given for picture in some)}
    if not scored:
        raise UserError(f"{scores} holds no scores")
    for some in scored.values():
        missing = [picture.file for picture in some if picture.file not in given]
        if missing:
            others = f" and {len(missing) - 1} more of its images" if len(missing) > 1 else ""
            raise UserError(f"{scores} has no score of {missing[0]}{others}; score all images of a variant, or none")
    return {name: _by_prompt(some, given) for name, some in scored.items()}


def _given(scores: LocationLike, pictures: Sequence[Picture]) -> dict[str, float]:
    """By file, its score."""
    known = {picture.file: picture for picture in pictures}
    given: dict[str, float] = {}
    for number, row in json_lines(scores, "the scores"):
        where = f"{scores}, line {number}"
        named = row.get("file", row.get("image_path"))
        # A path may be absolute: its last two parts are the variant and the image.
        name = "/".join(Path(str(named)).parts[-2:])
        if name not in known:
            raise UserError(f"{where} scores {named!r}, which is no image of this folder; name it by its 'file'")
        if row.get("sha256", known[name].sha256) != known[name].sha256:
            raise UserError(f"{where} scores another image than {name}: its sha256 differs; score these images")
        score = row.get("score")
        if not isinstance(score, int | float) or not np.isfinite(score):
            raise UserError(f"{where} has the score {score!r}; give a finite number, or true or false")
        if name in given:
            raise UserError(f"{where} scores {name} a second time; give each image one score")
        given[name] = float(score)
    return given


def _by_prompt(pictures: Sequence[Picture], given: Mapping[str, float]) -> dict[str, np.ndarray]:
    prompts: dict[tuple[str, str], list[float]] = {}
    for picture in pictures:
        prompts.setdefault((picture.category or "", picture.id), []).append(given[picture.file])
    groups: dict[str, list[float]] = {}
    for (category, _), values in prompts.items():
        groups.setdefault(category, []).append(float(np.mean(values)))
    return {category: np.array(values) for category, values in groups.items()}


def foreign_benchmark(
    name: str, suite: str, scores: LocationLike, pictures: Sequence[Picture], higher_is_better: bool
) -> Benchmark:
    """Raises `UserError` as `foreign_scores` does."""
    return Benchmark(name, suite, foreign_scores(scores, pictures), higher_is_better)
