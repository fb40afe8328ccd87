"""The calibration stage on Ray Data: prompts are encoded by one pool of actors, then the teacher is run by another.

The unit of work is a batch of prompts, known by its number. Only numbers and counts pass through Ray: an actor reads
its batch from a file and writes one, whole or not at all, so a batch that is done twice is the same file, a stopped job
continues where it stopped, and no memory grows with the number of prompts. The two passes follow each other, since the
text encoders and the transformer of a large teacher do not fit on one GPU together.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat, Watchdog
from jobs.stage import Stage, StageContext, Workers
from ppcl.calibration import dataset
from ppcl.calibration.encoding import EncodedPrompts, encode, negative_prompt
from ppcl.calibration.noised_images import noise_images
from ppcl.calibration.prompts import read_prompts
from ppcl.calibration.seeding import hashes, held_out
from ppcl.calibration.trajectory_recorder import NEGATIVE, StateSettings, check_arguments, record
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.models.placement import Images, place
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import CACHE, key_of, write_atomically
from ppcl.storage.mirror import download, exists, local_file, remove, store_of, to_local, upload
from ppcl.storage.node_cache import file_sha256, parallel_map

# Blocks a pass is cut into at most: each is one task of Ray.
_MOST_BLOCKS = 1000

_NEGATIVE = "negative.parquet"
_TEXTS = "texts.parquet"
_COMPLETE = "complete.json"


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
    for path in _others(work.states):
        remove(path)
    count = _cut(config, work.embeddings / _TEXTS)
    numbers = range(math.ceil(count / config.calibration.batch_size))
    number, setting, least = workers(config)
    resources = Resources(least or number, context.device, setting, config.worker_timeout_s)
    resources.wait()
    with Watchdog("a worker of calibration", resources) as watchdog:
        encoded = _Cache(work.embeddings, [_NEGATIVE, *(_name(n) for n in numbers)])
        _pass(_Encoder, work, encoded, numbers, watchdog, lambda done: progress(done, 2 * count))
        encoded.complete()
        sampled = _Cache(work.states, [_name(n) for n in numbers])
        _pass(_Sampler, work, sampled, numbers, watchdog, lambda done: progress(count + done, 2 * count))
        sampled.complete()

    encoded.link_to(folder / dataset.PROMPTS)
    sampled.link_to(folder / dataset.STATES)
    notes = [f"calibration: {reason}; others did its work" for reason in watchdog.killed]
    return _finish(context, count) | {"notes": notes}


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


class _Actor:
    """Makes one file of a batch of prompts, given by its number.

    Ray wraps what an actor raises in errors of its own, which do not keep the cause: a `UserError` goes home as a row.
    """

    def __init__(self, work: _Work, heartbeat: Heartbeat):
        heartbeat.start()
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"prompts": [self.make(int(batch["number"][0]))], "refusal": [""]}
        except UserError as error:
            return {"prompts": [0], "refusal": [str(error)]}

    def make(self, number: int) -> int:
        """Write the batch's file; gives the number of its prompts."""
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
    """Embeddings of a batch of prompts, and of the negative prompt where it is not there yet."""

    def make(self, number: int) -> int:
        work, sampling = self.work, self.work.config.sampling
        check_arguments(type(self.pipeline), sampling)
        negative = to_local(work.embeddings / _NEGATIVE)
        if not exists(work.embeddings / _NEGATIVE):
            text = negative_prompt(type(self.pipeline), sampling)
            # An empty prompt stands there where none is used, so that the cache has the same files in any case.
            dataset.write_embeddings(
                negative,
                [NEGATIVE],
                [text or ""],
                encode(self.pipeline, self.teacher.adapter, [text or ""], sampling),
            )
            upload(negative)
        rows = _texts(work, number)
        texts = [row["prompt"] for row in rows]
        embeddings = encode(self.pipeline, self.teacher.adapter, texts, sampling)
        path = to_local(work.embeddings / _name(number))
        dataset.write_embeddings(path, [row["prompt_id"] for row in rows], texts, embeddings)
        upload(path)
        return len(rows)


class _Sampler(_Actor):
    """States of a batch of prompts, on the teacher's trajectories or from images."""

    def load(self, dtype: Any) -> Any:
        if self.work.config.calibration.source == "images":
            return super().load(dtype)
        pipeline = self.teacher.pipeline("cpu", dtype)
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            setattr(pipeline, name, None)
        return self.placed(pipeline)

    def make(self, number: int) -> int:
        work = self.work
        ids, _, embeddings = dataset.read_embeddings(local_file(work.embeddings / _name(number)))
        whole = [row for row, e in enumerate(embeddings) if all(t.isfinite().all() for t in e.values())]
        states, call = [], None
        if whole:
            states, call = self._states(number, [ids[row] for row in whole], [embeddings[row] for row in whole], whole)
        finite = [state for state in states if state.latents.isfinite().all()]
        expected = len(states) * len(ids) // max(len(whole), 1) if whole else len(ids)
        path = to_local(work.states / _name(number))
        dataset.write_states(path, finite, call, dropped=expected - len(finite))
        upload(path)
        return len(ids)

    def _states(self, number: int, ids: list[int], embeddings: list[Any], rows: list[int]) -> Any:
        work, adapter = self.work, self.teacher.adapter
        sampling, settings = work.config.sampling, work.config.calibration
        state_settings = StateSettings(sampling, settings.states_per_prompt, work.config.seed)
        if settings.source == "images":
            images = [_texts(work, number)[row]["image"] for row in rows]
            prompts = EncodedPrompts(ids, embeddings)
            return noise_images(self.pipeline, adapter, prompts, images, self.teacher.config(), state_settings)
        negative = None
        if negative_prompt(type(self.pipeline), sampling) is not None:
            _, _, (negative,) = dataset.read_embeddings(local_file(work.embeddings / _NEGATIVE))
        return record(self.pipeline, adapter, EncodedPrompts(ids, embeddings, negative), state_settings)


class _Cache:
    """A folder of files of which some may be there already, from this job before it was stopped or from another."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names
        self.there = set(names)
        if above := store_of(folder):
            # All is needed on this node in the end; what was damaged on the way is made again.
            self.there &= set(above.objects())
            whole = parallel_map(lambda name: above.download(name, folder / name), sorted(self.there))
            for name in [name for name, right in zip(sorted(self.there), whole, strict=True) if not right]:
                above.remove(name)
                self.there.remove(name)
            return
        marker = folder / _COMPLETE
        known = json.loads(marker.read_text()) if marker.exists() else {}
        # A file of the cache may share its disk blocks with one in a job's folder: a change there is one here.
        for name, sha256 in known.items():
            path = folder / name
            if path.exists() and file_sha256(path) != sha256:
                path.unlink()

    def has(self, name: str) -> bool:
        return name in self.there and (self.folder / name).exists()

    def complete(self) -> None:
        if store_of(self.folder):
            download(self.folder)
            return
        hashes = {name: file_sha256(self.folder / name) for name in self.names}
        write_atomically(self.folder / _COMPLETE, json.dumps(hashes))

    def link_to(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in self.names:
            try:
                os.link(self.folder / name, folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.folder / name, folder / name)


def _pass(
    actor: type[_Actor], work: _Work, cache: _Cache, numbers: range, watchdog: Watchdog, progress: Callable[[int], None]
) -> None:
    """Let actors make the files of a cache that are not there."""
    missing = [n for n in numbers if not cache.has(_name(n))]
    if actor is _Encoder and not missing and not cache.has(_NEGATIVE):
        missing = [0]
    with pq.ParquetFile(work.embeddings / _TEXTS) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in numbers]
    done = sum(sizes) - sum(sizes[n] for n in missing)
    progress(done)
    if not missing:
        return
    for row in watchdog.results(_rows(actor, work, missing, watchdog.heartbeat)):
        if row["refusal"]:
            raise UserError(row["refusal"])
        done += int(row["prompts"])
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


def _cut(config: Config, path: Path) -> int:
    """Write the prompts as Parquet with one row group a batch, so that each can be read alone; gives their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = config.calibration
    schema = pa.schema([("prompt_id", pa.int64()), ("prompt", pa.string()), ("image", pa.string())])
    partial = path.with_name(path.name + ".partial")
    count = 0
    prompts = read_prompts(config.prompts, settings.prompt_column, _image_column(config), settings.max_prompts)
    with pq.ParquetWriter(partial, schema) as writer:
        while batch := list(islice(prompts, settings.batch_size)):
            columns = [pa.array(column, field.type) for column, field in zip(zip(*batch), schema)]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(batch)
    os.replace(partial, path)
    upload(path)
    return count


def _others(states: Path) -> list[Path]:
    """The caches of states of other settings."""
    names = {path.name for path in states.parent.glob("states-*")}
    if above := store_of(states.parent):
        names |= {name.split("/")[0] for name in above.objects() if name.startswith("states-")}
    return [states.with_name(name) for name in sorted(names - {states.name})]


def _finish(context: StageContext, prompts: int) -> dict[str, Any]:
    """Split the prompts, write what all samples share, count.

    Reads no latents and no embeddings, and keeps a few bytes a prompt.
    """
    config, teacher, folder = context.config, context.teacher, context.folder
    dropped, samples, call, sampled = 0, 0, None, []
    for path in sorted((folder / dataset.STATES).glob("*.parquet")):
        here, own_call = dataset.read_notes(path)
        ids = np.concatenate(
            [np.zeros(0, np.int64), *(batch["prompt_id"].to_numpy() for batch in _batches(path, ["prompt_id"]))]
        )
        dropped, samples, call = dropped + here, samples + len(ids), call or own_call
        sampled.append(np.unique(ids))
    if not samples or call is None:
        raise UserError(
            f"all states of the teacher {teacher.place} are NaN or infinite; check its weights and its precision"
        )
    ids = np.concatenate(sampled)
    hashed = hashes(_sampled_texts(folder / dataset.PROMPTS, ids), config.seed)
    if (hashed == hashed[0]).all():
        raise UserError(
            "only 1 prompt has finite states and at least 2 are needed; give more prompts or check the teacher"
        )
    out = held_out(hashed, config.calibration.held_out)
    dataset.write_call(folder, teacher.adapter.transformer, call)
    dataset.write_held_out(folder, ids[out])
    return {"prompts": prompts, "held_out_prompts": len(out), "samples": samples, "dropped": dropped}


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(columns=columns)


def _sampled_texts(folder: Path, ids: np.ndarray) -> Iterator[str]:
    """The prompts with these ids, ascending, in their order: that of the files and of the rows in each."""
    for path in sorted(folder.glob("*.parquet")):
        for batch in _batches(path, ["prompt_id", "prompt"]):
            here = batch["prompt_id"].to_numpy()
            kept = ids[np.minimum(np.searchsorted(ids, here), len(ids) - 1)] == here
            yield from (text for text, keep in zip(batch["prompt"].to_pylist(), kept, strict=True) if keep)


def _texts(work: _Work, number: int) -> list[dict[str, Any]]:
    with pq.ParquetFile(local_file(work.embeddings / _TEXTS)) as file:
        return file.read_row_group(number).to_pylist()


def _image_column(config: Config) -> str | None:
    return config.calibration.image_column if config.calibration.source == "images" else None


def _name(number: int) -> str:
    return f"{number:08d}.parquet"


STAGE = Stage(
    name="calibration",
    run=run,
    describe=lambda context: "prompts are encoded and the teacher's states on their trajectories kept",
    sections=("sampling", "calibration"),
    workers=workers,
    also_reads=lambda context: [context.identity.teacher_parts, context.identity.prompts],
)
