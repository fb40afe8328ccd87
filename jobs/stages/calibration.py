"""The calibration stage on Ray Data: prompts are encoded by one pool of actors, then the teacher is run by another.

Ray Data starts as many actors as resources allow, gives each the next batch of prompts, and replaces one that is lost.
The two passes follow each other, since the text encoders and the transformer of a large teacher do not fit on one GPU
together.

A row is the number of a batch. An actor reads the batch from a file and writes one, whole or not at all. So the same
prompts share a batch however often a job was stopped, a batch that is done twice is the same file, what is there needs
no other record, and no memory grows with the number of prompts. Why prompts, embeddings and states are not the rows,
and Ray Data's own checkpoints not used, is in `docs/architecture.md`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat, Watchdog
from jobs.stage import Stage, StageContext, Workers
from ppcl.calibration import batch_files, dataset
from ppcl.calibration.encoding import Embedding, EncodedPrompts, encode, negative_prompt
from ppcl.calibration.noised_images import noise_images
from ppcl.calibration.prompts import Prompt, read_prompts
from ppcl.calibration.trajectory_recorder import NEGATIVE, Call, State, StateSettings, record
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.models.placement import Images, place
from ppcl.models.teacher import Teacher
from ppcl.storage.atomic import replacing
from ppcl.storage.manifest import CACHE, key_of
from ppcl.storage.mirror import local_file, to_local, upload

# Blocks a pass is cut into at most: each is one task of Ray.
_MOST_BLOCKS = 1000

_BATCHES = "texts.parquet"
_PROMPTS = pa.schema([("id", pa.int64()), ("text", pa.string()), ("image", pa.string())])


def workers(config: Config) -> Workers:
    # One is enough: with fewer resources than workers the work is still done, and Ray Data asks for more by itself.
    return Workers(config.calibration.workers, "calibration.workers", least=1)


def run(context: StageContext) -> dict[str, Any]:
    """Make the calibration set; gives the numbers of its prompts and samples.

    What the actors make is kept in `cache` beside the stage's folder, on the same disk blocks: a run that was stopped
    continues from it, and one with other trajectory settings uses the embeddings.
    `events(done, total)` counts prompts, each once encoded and once sampled. Raises `UserError`, also for what a worker
    finds wrong.
    """
    config, folder, progress = context.config, context.folder, context.events
    work = _Work.of(context)
    batch_files.remove_others(work.states, "states-")
    sizes = _write_batches(config, work.embeddings / _BATCHES)
    count = sum(sizes.values())
    to_encode = {NEGATIVE: 0, **sizes}
    # One is enough; see `workers`.
    resources = Resources.of(workers(config)._replace(number=1), context.device, config)

    def tell(sentence: str) -> None:
        progress(0, phase=sentence)

    resources.wait(tell)
    with Watchdog("a worker of calibration", resources, tell) as watchdog:
        _make(_Encoder, work, to_encode, watchdog, lambda done: progress(done, 2 * count))
        batch_files.publish(work.embeddings, _names(to_encode), folder / dataset.PROMPTS)
        _make(_Sampler, work, sizes, watchdog, lambda done: progress(count + done, 2 * count))
        batch_files.publish(work.states, _names(sizes), folder / dataset.STATES)
    shares = config.calibration.validation, config.calibration.test
    made = dataset.finish(folder, context.teacher.adapter.transformer, config.seed, *shares)
    notes = [f"calibration: {reason}; others did its work" for reason in watchdog.killed]
    return {"prompts": count, **made, "notes": notes}


@dataclass(frozen=True)
class _Work:
    """What an actor is given. `embeddings` and `states` are named by a hash of everything that makes their content."""

    config: Config
    teacher: str
    embeddings: Path
    states: Path
    device: str
    nodes: int

    @classmethod
    def of(cls, context: StageContext) -> _Work:
        config, identity = context.config, context.identity
        settings, sampling = config.calibration, config.sampling
        encoders = {
            name: sha256
            for name, sha256 in identity.teacher_parts.items()
            if name.split("/")[0] not in ("vae", "scheduler")
        }
        embeddings = key_of(
            "embeddings",
            encoders,
            identity.prompts,
            settings.prompt_column,
            settings.max_prompts,
            settings.batch_size,
            context.device,
            sampling.arguments.get("negative_prompt"),
            sampling.arguments.get("max_sequence_length"),
            *([sampling.arguments["clip_skip"]] if "clip_skip" in sampling.arguments else []),
        )
        states = key_of(
            "states",
            embeddings,
            identity.teacher_parts,
            identity.teacher,
            sampling.model_dump(mode="json"),
            settings.source,
            settings.image_column,
            settings.states_per_prompt,
            context.seed,
        )
        cache = context.folder.parent / CACHE
        return cls(
            config,
            context.teacher.place,
            cache / f"embeddings-{embeddings}",
            cache / f"states-{states}",
            context.device,
            len([node for node in ray.nodes() if node["Alive"]]),
        )

    def batch(self, number: int) -> list[Prompt]:
        with pq.ParquetFile(local_file(self.embeddings / _BATCHES)) as file:
            # The negative prompt's row group is the first.
            return [Prompt(**row) for row in file.read_row_group(number - NEGATIVE).to_pylist()]


class _Actor:
    """Makes one file of a batch of prompts, given by its number. `makes`: which folder of its work it goes to.

    Ray wraps what an actor raises in errors of its own, which do not keep the cause: a `UserError` goes home as a row.
    """

    makes: ClassVar[Literal["embeddings", "states"]]

    def __init__(self, work: _Work, heartbeat: Heartbeat):
        heartbeat.start()
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number = int(batch["number"][0])
        path = to_local(getattr(self.work, self.makes) / _name(number))
        try:
            self.make(number, path)
            upload(path)
        except UserError as error:
            return {"number": [number], "refusal": [str(error)]}
        return {"number": [number], "refusal": [""]}

    def make(self, number: int, path: Path) -> None:
        """Write the file of a batch."""
        raise NotImplementedError

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher(self.work.teacher)

    @cached_property
    def pipeline(self) -> Any:
        """The part of the teacher's pipeline that is needed, loaded at the first batch."""
        # The pipelines warn about every argument they leave unused, at every call.
        diffusers.utils.logging.set_verbosity_error()
        work = self.work
        if work.device == "cpu":
            on_this_node = math.ceil(work.config.calibration.workers / work.nodes)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_node))
        return self.load(torch.bfloat16 if work.device == "cuda" else torch.float32)

    def load(self, dtype: Any) -> Any:
        return self.placed(self.teacher.pipeline_without_transformer("cpu", dtype))

    def placed(self, pipeline: Any) -> Any:
        config = self.work.config
        images = Images(config.calibration.batch_size, config.sampling.height, config.sampling.width)
        place(pipeline, self.work.device, config.memory, images)
        return pipeline


class _Encoder(_Actor):
    """Embeddings of a batch of prompts."""

    makes = "embeddings"

    def make(self, number: int, path: Path) -> None:
        sampling = self.work.config.sampling
        prompts = self.work.batch(number)
        embeddings = encode(
            self.pipeline,
            self.teacher.adapter,
            [p.text for p in prompts],
            sampling,
            negative=number == NEGATIVE,
            transformer_config=self.teacher.config(),
        )
        dataset.write_embeddings(path, [p.id for p in prompts], [p.text for p in prompts], embeddings)


class _Sampler(_Actor):
    """States of a batch of prompts, on the teacher's trajectories or from images."""

    makes = "states"

    def load(self, dtype: Any) -> Any:
        if self.work.config.calibration.source == "images":
            return super().load(dtype)
        pipeline = self.teacher.pipeline("cpu", dtype)
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            setattr(pipeline, name, None)
        return self.placed(pipeline)

    def make(self, number: int, path: Path) -> None:
        ids, embeddings = self._embeddings(number)
        finite = [row for row, e in enumerate(embeddings) if all(t.isfinite().all() for t in e.values())]
        if not finite:
            dataset.write_states(path, [], None, dropped=len(ids))
            return
        encoded = EncodedPrompts([ids[row] for row in finite], [embeddings[row] for row in finite], self._negative())
        states, call = self._states(number, encoded, finite)
        expected = len(states) * len(ids) // len(finite)
        states = [state for state in states if state.latents.isfinite().all()]
        dataset.write_states(path, states, call, dropped=expected - len(states))

    def _embeddings(self, number: int) -> tuple[list[int], list[Embedding]]:
        ids, _, embeddings = dataset.read_embeddings(local_file(self.work.embeddings / _name(number)))
        return ids, embeddings

    def _negative(self) -> Embedding | None:
        if self.work.config.calibration.source == "images":
            return None
        if negative_prompt(type(self.pipeline), self.work.config.sampling) is None:
            return None
        return self._embeddings(NEGATIVE)[1][0]

    def _states(self, number: int, encoded: EncodedPrompts, rows: list[int]) -> tuple[list[State], Call]:
        """`rows`: those of the prompts in the batch."""
        config, adapter = self.work.config, self.teacher.adapter
        settings = StateSettings(config.sampling, config.calibration.states_per_prompt, config.seed)
        if config.calibration.source == "trajectories":
            return record(self.pipeline, adapter, encoded, settings)
        prompts = self.work.batch(number)
        images = [str(prompts[row].image) for row in rows]
        return noise_images(self.pipeline, adapter, encoded, images, self.teacher.config(), settings)


def _make(
    actor: type[_Actor], work: _Work, sizes: dict[int, int], watchdog: Watchdog, progress: Callable[[int], None]
) -> None:
    """Let actors make the files that are not there yet. `sizes`: by number of a batch, that of its prompts."""
    whole = batch_files.whole_files(getattr(work, actor.makes), _names(sizes))
    missing = [number for number in sizes if _name(number) not in whole]
    done = sum(sizes.values()) - sum(sizes[number] for number in missing)
    progress(done)
    if not missing:
        return
    for row in watchdog.results(_rows(actor, work, missing, watchdog.heartbeat)):
        if row["refusal"]:
            raise UserError(row["refusal"])
        done += sizes[row["number"]]
        progress(done)


def _rows(actor: type[_Actor], work: _Work, numbers: list[int], heartbeat: Heartbeat) -> Iterator[dict[str, Any]]:
    """What a pool of actors gives back for the batches of these numbers, as they come."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=min(len(numbers), _MOST_BLOCKS))
    # It grows as resources become free.
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(work.config.calibration.workers, len(numbers)))
    gpus = 1 if work.device == "cuda" else 0
    # Restarts matter where a node can go away; on a single one Ray only warns of them, at length, on the console.
    restarts = {"max_restarts": 0} if work.nodes == 1 else {}
    with warnings.catch_warnings():
        # The way to say so is to change in Ray 2.64, whose successor is not there yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        made = rows.map_batches(
            actor,
            fn_constructor_args=[work, heartbeat],
            batch_size=1,
            compute=pool,
            num_cpus=1,
            num_gpus=gpus,
            **restarts,
        )
    return made.iter_rows()


def _write_batches(config: Config, path: Path) -> dict[int, int]:
    """Write the prompts as Parquet, a row group for each batch, so that each can be read alone.

    Gives the number of prompts by that of their batch. The negative prompt is a batch before the first.
    """
    settings = config.calibration
    # An empty prompt stands there where none is used, so that the cache has the same files in any case.
    negative = config.sampling.arguments.get("negative_prompt") or ""
    images = settings.image_column if settings.source == "images" else None
    prompts = read_prompts(config.prompts, settings.prompt_column, images, settings.max_prompts)
    sizes: dict[int, int] = {}
    with replacing(path) as partial, pq.ParquetWriter(partial, _PROMPTS) as writer:
        writer.write_table(_table([Prompt(NEGATIVE, negative, None)]))
        while batch := list(islice(prompts, settings.batch_size)):
            writer.write_table(_table(batch))
            sizes[len(sizes)] = len(batch)
    upload(path)
    return sizes


def _table(prompts: list[Prompt]) -> pa.Table:
    return pa.Table.from_pylist([prompt._asdict() for prompt in prompts], _PROMPTS)


def _names(numbers: Iterable[int]) -> list[str]:
    return [_name(number) for number in numbers]


def _name(number: int) -> str:
    return "negative.parquet" if number == NEGATIVE else f"{number:08d}.parquet"


STAGE = Stage(
    name="calibration",
    run=run,
    describe=lambda context: "prompts are encoded and the teacher's states on their trajectories kept",
    sections=("sampling", "calibration"),
    workers=workers,
    also_reads=lambda context: [context.identity.teacher_parts, context.identity.prompts],
)
