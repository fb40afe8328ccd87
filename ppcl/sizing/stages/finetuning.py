"""Fine-tuning: data-parallel ranks, sharded or whole, and their activations."""

from __future__ import annotations

from ppcl.replacements import Interval
from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.memory import STUDENT_BYTES
from ppcl.training.finetuning.measured_plans import BATCH, SAMPLES

_SINGLE = 4
# Units that FSDP holds whole at once: the one that runs and the next one.
_GATHERED = 2


def workers(job: JobSize) -> list[WorkerSize]:
    settings, model, sizes = job.config.finetuning, job.model, job.replacements
    if settings.steps == 0:
        return []
    ranks = settings.data_parallel
    sharded = settings.shard and ranks > 1
    parts = ranks if sharded else 1
    blocks, largest = sum(model.blocks), max(model.blocks)
    trained, in_full = job.fine_tuned, settings.train == "all"
    samples = -(-settings.batch_size // ranks)
    device = {
        "teacher": job.number * (model.rest + blocks // parts),
        # All are loaded where they are sharded; else those that are trained, and the modulations.
        "frozen replacements": job.number * (sizes.all - trained if sharded and not in_full else sizes.basis) // parts,
        "trained replacements": STUDENT_BYTES * trained // parts,
        "cast weights": 0 if job.cpu else job.number * (largest if settings.activation_checkpointing else trained),
        # Of blocks in training their gradients as well, before each rank has its part.
        "gathered": _GATHERED * (2 * _SINGLE if in_full else job.number) * largest if sharded else 0,
        "activations": _activations(job, samples),
        "features": _features(job, samples) if settings.feature_loss else 0,
    }
    # Forward, backward through all blocks, the target's forward; and the forward again where it is recomputed.
    passes = 4 + settings.activation_checkpointing
    plans = settings.measured_plans + job.variants
    forwards = passes * settings.steps * settings.batch_size + 2 * plans * min(SAMPLES, job.validation)
    # The teacher's forward, then the forward, backward and forward again of what is trained, if it is of the blocks.
    again = 1 + settings.activation_checkpointing
    gathered = job.number * blocks + again * (_SINGLE * trained if in_full else job.number * blocks)
    gathers = gathered * (ranks - 1)
    traffic = settings.steps * (gathers + _SINGLE * trained * (ranks - 1)) if sharded else 0
    seconds = None
    if not job.cpu:
        link = job.device.between(0, ranks - 1) * ranks
        seconds = max(job.compute_seconds(forwards * job.forward_flops / ranks), traffic / link)
    return [
        WorkerSize(
            stage="finetuning",
            worker="rank",
            count=ranks,
            device=device,
            # A rank's part of the weights and both moments on their way into a file.
            host={"checkpoint": 3 * _SINGLE * trained // parts},
            written=_SINGLE * trained,
            sent=traffic,
            seconds=seconds,
        )
    ]


def _activations(job: JobSize, samples: int) -> int:
    """The most of a training step, with the students on or without them, and of measuring plans."""
    settings, model, students = job.config.finetuning, job.model, list(job.replacements.students)
    if settings.train == "all":
        students = [one for one in job.plan_in_full or () if isinstance(one, Interval)]
    gone = {block for one in students for block in one.blocks}
    blocks = range(len(model.blocks))
    tuned = set(job.tuned_blocks)
    without = [(model.memory[b].saved if b in tuned else model.memory[b].frozen).of(samples) for b in blocks]
    # A trained FFN or attention keeps the inputs of its maps, too.
    maps = samples * job.number * model.tokens * model.width
    for block in [*job.replacements.widest, *job.replacements.heads]:
        without[block] += 2 * maps
    on = [without[b] for b in blocks if b not in gone] + [model.memory[i.first].saved.of(samples) for i in students]
    if settings.activation_checkpointing:
        step = len(blocks) * samples * job.stream + max([*without, *on])
    else:
        step = max(sum(without), sum(on))
    measured = -(-min(BATCH, job.validation) // settings.data_parallel)
    return max(step, job.forward_bytes(measured))


def _features(job: JobSize, samples: int) -> int:
    """Behind every block the teacher's image stream, and in float32 its difference from the variant's."""
    model = job.model
    numbers = len(model.blocks) * samples * (model.tokens - model.text_tokens) * model.width
    return numbers * (job.number + _SINGLE)
