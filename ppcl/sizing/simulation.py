"""The step-time estimate: a simulation of the pipeline on many GPUs, each rank with the work of the real code.

Which blocks and students a rank has, and how long a pipeline can be, come from the code that places them in a job. Here
is only what one piece of work takes: operations and bytes over the rates of a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcl.errors import UserError
from ppcl.replacements import Interval
from ppcl.sizing.device import USABLE, Device
from ppcl.sizing.memory import GRADIENT_BYTES, TEACHER_BYTES, meshes, rank_of, segment
from ppcl.sizing.model import Model
from ppcl.training.pipeline import IN_FLIGHT, balanced_segments

# Bytes that a step moves a parameter of a student: its cast (6) and two reads in bfloat16 (4), its gradient (2) cast to
# float32 (6), the norm (4) and the clip (8), AdamW's four tensors read and three written (28).
STUDENT_TRAFFIC = 58
# Beside that, a gradient that is put into one message and taken out again.
_REDUCE_TRAFFIC = 16
# Messages of a student in a step between replicas: the losses' divisors, the gradient, the losses.
_MESSAGES = 3
# Bytes that adding one chunk of tokens to `X^T X` and `X^T Y` moves, by the square of the width; tokens of a chunk.
_SUMS_TRAFFIC, _CHUNK = 272, 16384

MODEL = """\
step        = the step of the slowest rank, or longer if streams arrive late; all ranks are simulated, step by step
a block     = the longer of operations / (flops × utilisation) and its weights / (memory × reached)
a student   = forward and backward of its block and its affine maps, and 58 bytes per parameter for casts, clipping \
and AdamW
all-reduce  = 2 (dp − 1) / dp × 4 bytes per parameter between the replicas, student after student, without overlap
streams     = sent while the rank trains; a send waits for its receiver, \
and a rank waits while two of its sends are pending
probes      = one pipeline, the sums of every block by float32 products; no replicas, so no more ranks than blocks
efficiency  = speed over that of one GPU with enough memory, times the number of GPUs"""


@dataclass(frozen=True)
class Work:
    """Seconds of one rank in a step: before it receives, its blocks until it sends, and after that.

    `compute`, `sums`, `weights` and `reduce` are the parts of all of that: products of the blocks, products that probes
    are fitted from, memory traffic alone, all-reduces.
    """

    before: float
    blocks: float
    after: float
    compute: float
    sums: float = 0.0
    weights: float = 0.0
    reduce: float = 0.0

    @property
    def seconds(self) -> float:
        return self.before + self.blocks + self.after


@dataclass(frozen=True)
class Step:
    """A simulated step, in seconds.

    `step`: in the steady state. `fill`: until the last rank has its first streams. The parts of the step on its slowest
    rank: `compute` and `sums` as if all ranks had equal shares, `imbalance` above that, `weights`, `reduce`, `streams`.
    `read`: seconds to read the weights at the start. `used` of `gpus` have work.
    """

    gpus: int
    used: int
    pp: int
    dp: int
    samples: int
    step: float
    fill: float
    read: float
    throughput: float
    efficiency: float
    compute: float
    sums: float
    imbalance: float
    weights: float
    reduce: float
    streams: float

    @property
    def binds(self) -> str:
        """What takes most beside computing equal shares, or computing where that is less than a tenth of the step."""
        words = {
            "sums": "sums",
            "imbalance": "slowest segment",
            "weights": "memory",
            "reduce": "all-reduce",
            "streams": "streams",
        }
        most = max(words, key=lambda name: getattr(self, name))
        if self.used < self.gpus:
            return "number of blocks"
        return words[most] if getattr(self, most) > 0.1 * self.step else "compute"


def play(works: Sequence[Work], send: Sequence[float], steps: int) -> list[list[float]]:
    """When each rank of a pipeline ends each step: `[step][rank]`, seconds. `send`: seconds to the next.

    As in `ppcl.training.pipeline.PipelineStage`, receiving waits, and sending waits while `IN_FLIGHT` sends pend.
    """
    last = len(works) - 1
    done: list[list[float]] = []
    taken: list[list[float]] = []  # by step and rank, when its streams are with the next one
    for step in range(steps):
        now, arrived, gone = [], 0.0, []
        for rank, work in enumerate(works):
            asked = (done[-1][rank] if done else 0.0) + work.before
            sent = max(asked, arrived) + work.blocks
            waited = sent
            if rank < last:
                next_asks = (done[-1][rank + 1] if done else 0.0) + works[rank + 1].before
                free = taken[-1][rank] if taken else 0.0
                arrived = max(sent, next_asks, free) + send[rank]
                gone.append(arrived)
                if step >= IN_FLIGHT:
                    waited = max(sent, taken[-IN_FLIGHT][rank])
            now.append(waited + work.after)
        done.append(now)
        taken.append(gone)
    return done


def distillation(model: Model, plan: Sequence[Interval], batch: int, gpus: int, device: Device) -> Step:
    """The fastest mesh of that many GPUs which the memory of the device holds. Raises `UserError` where none does."""
    can = meshes(model, plan, batch, gpus)
    fit = [dims for dims in can if _memory(model, plan, batch, *dims) <= USABLE * device.size]
    if not fit:
        least = min(_memory(model, plan, batch, *dims) for dims in can)
        raise UserError(
            f"{gpus} GPUs: a rank needs {least / 1e9:.0f} GB, a device has {device.size / 1e9:.0f} GB, of which nine "
            "tenths are usable"
        )
    return min((distillation_on(model, plan, batch, *dims, device) for dims in fit), key=lambda made: made.step)


def _memory(model: Model, plan: Sequence[Interval], batch: int, pp: int, dp: int) -> int:
    return max(rank_of(model, plan, -(-batch // dp), stage, pp, dp).memory for stage in range(pp))


def distillation_on(model: Model, plan: Sequence[Interval], batch: int, pp: int, dp: int, device: Device) -> Step:
    """A step of `batch` samples over `dp` replicas of a pipeline of `pp` ranks."""
    samples = -(-batch // dp)
    works = [distillation_work(model, plan, samples, stage, pp, dp, device) for stage in range(pp)]
    alone = distillation_work(model, plan, batch, 0, 1, 1, device)
    held = [sum(model.blocks[b] for b in segment(model, plan, stage, pp)) + model.rest for stage in range(pp)]
    return _step(model, _Mesh(works, alone, held, batch, samples, pp * dp, dp), device)


def probes(model: Model, batch: int, gpus: int, device: Device) -> Step:
    """A step of the fit of all probes, on one pipeline: `batch` samples a forward."""
    pp = min(gpus, len(model.blocks))
    parts = balanced_segments([1.0] * len(model.blocks), pp)
    works = [_probes_work(model, batch, part, device) for part in parts]
    alone = _probes_work(model, batch, range(len(model.blocks)), device)
    held = [sum(model.blocks[b] for b in part) + model.rest for part in parts]
    return _step(model, _Mesh(works, alone, held, batch, batch, gpus, 1), device)


@dataclass(frozen=True)
class _Mesh:
    """A step of `batch` samples, `samples` for each of `dp` replicas of a pipeline, on some of so many `gpus`.

    `works`: of the ranks of a pipeline. `alone`: of a single rank with all blocks and all samples. `held`: parameters
    of the teacher, by rank.
    """

    works: list[Work]
    alone: Work
    held: list[int]
    batch: int
    samples: int
    gpus: int
    dp: int


def _step(model: Model, mesh: _Mesh, device: Device) -> Step:
    works, dp = mesh.works, mesh.dp
    pp = len(works)
    stream = mesh.samples * model.stream_bytes
    # The slowest link over the replicas: where the pipeline crosses from node to node.
    send = [
        device.latency + stream / min(device.between(r * pp + stage, r * pp + stage + 1) for r in range(dp))
        for stage in range(pp - 1)
    ]
    steps = 8 * pp + 20
    done = play(works, send, 2 * steps)
    step = (done[-1][-1] - done[steps - 1][-1]) / steps
    slowest = max(works, key=lambda work: work.seconds)
    compute, sums = (sum(getattr(work, name) for work in works) / pp for name in ("compute", "sums"))
    return Step(
        gpus=mesh.gpus,
        used=pp * dp,
        pp=pp,
        dp=dp,
        samples=mesh.samples,
        step=step,
        fill=done[0][-1] - works[-1].seconds,
        read=_read(mesh.held, dp, device),
        throughput=mesh.batch / step,
        efficiency=mesh.alone.seconds / (mesh.gpus * step),
        compute=compute,
        sums=sums,
        imbalance=slowest.compute + slowest.sums - compute - sums,
        weights=slowest.weights,
        reduce=slowest.reduce,
        streams=step - slowest.seconds,
    )


def _read(held: Sequence[int], dp: int, device: Device) -> float:
    """Of the fullest node, whose ranks read their own tensors each."""
    ranks = list(held) * dp
    return (
        max(sum(ranks[i : i + device.node]) for i in range(0, len(ranks), device.node)) * TEACHER_BYTES / device.storage
    )


def distillation_work(
    model: Model, plan: Sequence[Interval], samples: int, stage: int, pp: int, dp: int, device: Device
) -> Work:
    """Of one rank, a step of `samples` samples."""
    part = segment(model, plan, stage, pp)
    mine = [interval for interval in plan if interval.first in part]
    rate, memory = device.flops * device.utilisation, device.memory * device.reached
    before = device.overhead * samples * model.rest_flops / rate
    blocks = device.overhead * sum(
        max(samples * model.flops[b] / rate, TEACHER_BYTES * model.blocks[b] / memory) for b in part
    )
    # Weights and inputs of the affine maps take a product each in the backward pass.
    affine = 6 * model.tokens * model.width**2
    training = device.overhead * samples * sum(model.trained_flops[i.first] + affine for i in mine) / rate
    students = [model.blocks[i.first] + model.affine for i in mine]
    weights = device.overhead * sum(students) * (STUDENT_TRAFFIC + (_REDUCE_TRAFFIC if dp > 1 else 0)) / memory
    link = (
        min(device.between(stage + replica * pp, stage + (replica + 1) % dp * pp) for replica in range(dp))
        if dp > 1
        else 1.0
    )
    reduce = 2 * (dp - 1) * (sum(students) * GRADIENT_BYTES / dp / link + len(students) * _MESSAGES * device.latency)
    return Work(before, blocks, training + weights + reduce, before + blocks + training, 0.0, weights, reduce)


def _probes_work(model: Model, samples: int, part: range, device: Device) -> Work:
    rate, memory = device.flops * device.utilisation, device.memory * device.reached
    before = device.overhead * samples * model.rest_flops / rate
    forward = [max(samples * model.flops[b] / rate, TEACHER_BYTES * model.blocks[b] / memory) for b in part]
    products = [samples * model.sums_flops[b] / (device.sums * device.utilisation) for b in part]
    # Two fits a stream where its FFN has one, too, in chunks.
    chunks = -(-samples * model.tokens // _CHUNK)
    moved = [
        chunks * _SUMS_TRAFFIC * model.width**2 * model.sums_flops[b] / (4 * model.width**2 * model.tokens) / memory
        for b in part
    ]
    adding = [device.overhead * (p + m) for p, m in zip(products, moved)]
    # Streams are sent on before the last block's are added.
    running = device.overhead * sum(forward)
    sums, weights = (device.overhead * sum(parts) for parts in (products, moved))
    return Work(before, running + sum(adding[:-1]), adding[-1], before + running, sums, weights)
