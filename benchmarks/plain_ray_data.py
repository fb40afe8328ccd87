"""Calibration as a plain Ray Data pipeline with Ray's own checkpoints: what the stage is compared with.

    python benchmarks/streaming.py --demo --pipelines stage plain --repeats 3

Two datasets, read_parquet → map_batches(encode) → write_parquet and the same with sampling, for trajectories without
guidance. Rows are prompts and states. `docs/architecture.md` says what this does not hold.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from ray.data.checkpoint import CheckpointConfig

from ppcl.calibration import dataset
from ppcl.calibration.encoding import EncodedPrompts, encode
from ppcl.calibration.prompts import read_prompts
from ppcl.calibration.trajectory_recorder import StateSettings, record
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher


class _Encoder:
    def __init__(self, config: Config):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.calibration.workers))
        self.config, self.teacher = config, Teacher(config.teacher)
        self.pipeline = self.load()

    def load(self) -> Any:
        return self.teacher.pipeline_without_transformer()

    def __call__(self, prompts: pa.Table) -> pa.Table:
        texts = prompts["prompt"].to_pylist()
        embeddings = encode(self.pipeline, self.teacher.adapter, texts, self.config.sampling)
        columns = {
            name: pa.array([dataset.pack(e[name]) for e in embeddings], dataset._TENSOR) for name in embeddings[0]
        }
        return pa.table({"prompt_id": prompts["prompt_id"], "prompt": prompts["prompt"], **columns})


class _Sampler(_Encoder):
    def load(self) -> Any:
        pipeline = self.teacher.pipeline()
        for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
            setattr(pipeline, name, None)
        return pipeline

    def __call__(self, prompts: pa.Table) -> pa.Table:
        rows = prompts.to_pylist()
        names = prompts.column_names[2:]
        encoded = EncodedPrompts(
            [row["prompt_id"] for row in rows], [{name: dataset.unpack(row[name]) for name in names} for row in rows]
        )
        settings = StateSettings(self.config.sampling, self.config.calibration.states_per_prompt, self.config.seed)
        states, _ = record(self.pipeline, self.teacher.adapter, encoded, settings)
        made = [vars(state) | {"latents": dataset.pack(state.latents)} for state in states]
        return pa.Table.from_pylist(made, dataset._STATE_SCHEMA)


def calibrate(config: Config, folder: Path) -> int:
    """Fill `prompts` and `states` of a folder, from where an earlier call was ended; gives the number of prompts."""
    texts = folder / "texts"
    count = _write_texts(config, texts)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for actor, source, name in ((_Encoder, texts, "prompts"), (_Sampler, folder / "prompts", "states")):
        context.checkpoint_config = CheckpointConfig(
            "prompt_id", str(folder / "checkpoints" / name), delete_checkpoint_on_success=False
        )
        rows = ray.data.read_parquet(str(source))
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=config.calibration.workers)
        made = rows.map_batches(
            actor,
            fn_constructor_args=[config],
            batch_size=config.calibration.batch_size,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=1,
        )
        made.write_parquet(str(folder / name))
    context.checkpoint_config = None
    return count


def _write_texts(config: Config, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.calibration
    prompts = list(read_prompts(config.prompts, settings.prompt_column, None, settings.max_prompts))
    table = pa.table({"prompt_id": [p.id for p in prompts], "prompt": [p.text for p in prompts]})
    groups = math.ceil(len(prompts) / settings.batch_size)
    pq.write_table(table, folder / "texts.parquet", row_group_size=math.ceil(len(prompts) / groups))
    return len(prompts)
