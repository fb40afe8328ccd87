"""What a rank of fine-tuning holds at most, whole and sharded, with kept and with recomputed activations."""

import json
from dataclasses import replace

import pytest
import torch

from ppcl.config.schema import Finetuning, Sampling
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, PrunedFfn
from ppcl.replacements.io import files_in
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.stages import finetuning
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, sized

PLAN = [Interval(0, 1), PrunedFfn(3, 50), PrunedFfn(4, 50)]


def _job(folder, shard, recompute, train="replacements", features=False):
    return sized.job_of(
        folder,
        PLAN,
        distillation={"steps": 1, "batch_size": 8, "warmup": 0},
        finetuning={
            "plan": ",".join(map(str, PLAN)),
            "train": train,
            "steps": 3,
            "warmup": 1,
            "batch_size": 8,
            "data_parallel": 2,
            "measured_plans": 2,
            "shard": shard,
            "activation_checkpointing": recompute,
            "feature_loss": features,
        },
    )


def _measure(folder, students, out, shard, recompute, train, features):
    dims = ParallelDims.join(1, 2)
    distilled = DistilledReplacements(files_in(students), {"a": PLAN}, dict.fromkeys(PLAN, 0.1))
    settings = _job(folder, shard, recompute, train, features).config.finetuning
    with torch.enable_grad(), PeakMemory() as memory:
        run = RunContext(out, out / "checkpoints", dims=dims)
        finetune(Teacher(folder), sized.SizedSamples(), distilled, settings, run, Sampling(steps=4))
    (out / f"{dims.rank}.json").write_text(json.dumps(memory.peak))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    folder = sized.pipeline(out / "teacher")
    with torch.enable_grad():
        run = RunContext(out, out / "checkpoints")
        distil(Teacher(folder), sized.SizedSamples(), PLAN, _job(folder, False, False).config.distillation, run)
    return folder, out


@pytest.mark.parametrize(
    ("shard", "recompute", "train", "features"),
    [
        (False, False, "replacements", False),
        (False, True, "replacements", False),
        (True, False, "replacements", False),
        (True, True, "replacements", False),
        (False, False, "all", False),
        (True, True, "all", False),
        (True, True, "replacements", True),
        (True, True, "all", True),
    ],
)
def test_two_real_ranks_hold_what_is_computed(distilled, tmp_path, shard, recompute, train, features):
    folder, students = distilled
    ranks.run(2, _measure, folder, students, tmp_path, shard, recompute, train, features)
    counted = max(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    (rank,) = finetuning.workers(_job(folder, shard, recompute, train, features))
    assert 0.9 < rank.device_bytes / counted < 1.1, dict(rank.device)


def test_a_name_alone_counts_all_blocks_as_trained(distilled):
    folder, _ = distilled
    job = _job(folder, True, True, "all")
    named = replace(job, config=job.config.model_copy(update={"finetuning": Finetuning(plan="p50", train="all")}))
    assert job.tuned_blocks == [2, 3, 4, 5] and named.tuned_blocks == list(range(6))
    assert job.replacements.fine_tuned < job.fine_tuned < named.fine_tuned == sum(job.model.blocks)
