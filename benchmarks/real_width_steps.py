"""Step times of the whole Qwen-Image and of its variants on one GPU; see `benchmarks/real_width.py`.

No weight is trained: times depend on shapes alone. The plans are made of what a job makes: student blocks for
intervals, FFNs with fewer hidden units, modulations in low rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.models import Streams, adapter_of, embed, swap
from ppcl.replacements import Interval, LowRankModulation, PrunedFfn, Replacement
from ppcl.replacements.assembly import block_map
from ppcl.replacements.low_rank_modulation import ModulationBasis
from ppcl.replacements.parameter_counts import ffn_parameters
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.sizing.model import published
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.parallel_dims import ParallelDims

SIZE, ROUNDS, DIRECTIONS = 1024, 5, 8
TEXT_TOKENS = 512
# The paper's figures (arXiv 2511.16156), for its own measurement of a step and of the memory.
PAPER = {"teacher": (2625, 100.0), "14 B": (1792, 79.4), "12 B": (1514, 71.4), "10 B": (1462, 66.9)}
BILLIONS = {"14 B": 14.0, "12 B": 12.0, "10 B": 10.0}


def new_transformer(blocks: int) -> nn.Module:
    """Qwen-Image with random weights, made on the GPU block by block."""
    import diffusers

    config = published()["qwen-image"]["config"] | {"num_layers": blocks}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = diffusers.QwenImageTransformer2DModel(**config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def call(samples: int) -> dict[str, Any]:
    """Arguments of the stock forward."""
    side = SIZE // 16
    config = published()["qwen-image"]["config"]
    made = {
        "hidden_states": torch.randn(samples, side * side, config["in_channels"]),
        "encoder_hidden_states": torch.randn(samples, TEXT_TOKENS, config["joint_attention_dim"]),
        "timestep": torch.rand(samples),
    }
    made = {name: value.to("cuda", torch.bfloat16) for name, value in made.items()}
    return made | {"img_shapes": [[(1, side, side)]] * samples, "encoder_hidden_states_mask": None}


def plan_of(transformer: nn.Module, billions: float, low_rank: bool) -> list[Replacement]:
    """Intervals of four blocks from the middle on, then halved FFNs, until so many parameters are left."""
    adapter = adapter_of(transformer)
    blocks = adapter.blocks(transformer)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    left = float(sum(p.numel() for p in transformer.parameters()))
    plan: list[Replacement] = [LowRankModulation()] if low_rank else []
    if low_rank:
        left -= sum(_modulation(adapter, transformer, number, block) for number, block in enumerate(blocks))
    for first in _from_the_middle(len(blocks), 4):
        if left - 3 * sizes[first] < billions * 1e9:
            break
        plan.append(Interval(first, first + 3))
        left -= 3 * sizes[first]
    gone = {block for one in plan for block in one.blocks}
    for number in (number for number in range(len(blocks)) if number not in gone):
        if left <= billions * 1e9:
            break
        plan.append(PrunedFfn(number, 50))
        parts = adapter.parts_of(transformer, number, blocks[number])
        left -= sum(ffn_parameters(adapter, blocks[number], where) for where in parts.values()) / 2
    return plan


def _from_the_middle(count: int, length: int) -> Iterator[int]:
    """Where runs of blocks begin, the middle ones first."""
    starts = range(length, count - 2 * length + 1, length)
    yield from sorted(starts, key=lambda start: abs(start + length / 2 - count / 2))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _modulation(adapter: Any, transformer: nn.Module, number: int, block: nn.Module) -> int:
    """What low rank takes away of a block's modulations."""
    parts = adapter.parts_of(transformer, number, block)
    weights = [block.get_submodule(where.modulation).weight for where in parts.values()]
    return sum(weight.numel() - weight.shape[0] * DIRECTIONS for weight in weights)


def plug(transformer: nn.Module, plan: Sequence[Replacement]) -> None:
    """Leave the transformer with a plan on, of modules with random weights."""
    adapter = adapter_of(transformer)
    blocks = adapter.blocks(transformer)
    known = TeacherBlocks(adapter, transformer, dict(enumerate(blocks)), len(blocks))
    modules: dict[Replacement, nn.Module] = {}
    for one in plan:
        if isinstance(one, Interval):
            modules[one] = new_objective(known, one, Distillation()).module.to("cuda", torch.bfloat16)
        elif isinstance(one, PrunedFfn):
            block = blocks[one.block]
            parts = adapter.parts_of(transformer, one.block, block)
            modules[one] = PrunedFfnMaps.new(adapter, block, parts, one.keep_percent)
        else:
            modules[one] = ModulationBasis(transformer.inner_dim, DIRECTIONS).to("cuda", torch.bfloat16)
        modules[one].requires_grad_(False)
    swap(transformer, block_map(adapter, transformer, blocks, modules, plan))


def seconds_of(run: Callable[[], Any]) -> float:
    """The median of some runs, after one that warms up."""
    taken = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def parameters_of(transformer: nn.Module) -> int:
    """Those that a step uses, each counted once."""
    return sum(p.numel() for p in {id(p): p for p in transformer.parameters()}.values())


def time_steps(blocks: int) -> dict[str, Any]:
    """Time a step of the teacher and of the variants, and a distillation step of one rank of a pipeline of 8."""
    if not torch.cuda.is_available():
        raise SystemExit("--on-gpu needs a GPU; without the option a job runs on the CPU")
    out = Console(width=140)
    transformer, given = new_transformer(blocks), call(1)
    teachers = dict(enumerate(adapter_of(transformer).blocks(transformer)))
    whole = parameters_of(transformer)
    rows = []
    plans: Mapping[str, list[Replacement]] = {"teacher": []} | {
        name + (", modulations in low rank" if low_rank else ""): plan_of(
            transformer, billions * whole / 20.43e9, low_rank
        )
        for name, billions in BILLIONS.items()
        for low_rank in (False, True)
    }

    @torch.no_grad()
    def step() -> None:
        transformer(**given, return_dict=False)

    for name, plan in plans.items():
        swap(transformer, teachers)
        plug(transformer, plan)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step)
        rows.append(
            {
                "variant": name,
                "plan": ",".join(map(str, plan)),
                "parameters": parameters_of(transformer),
                "seconds": seconds,
                "step_bytes": torch.cuda.max_memory_allocated(),
            }
        )
    swap(transformer, teachers)
    table = Table(
        title=f"{torch.cuda.get_device_name()}: a step at {SIZE} × {SIZE}, batch 1, bfloat16, {blocks} blocks"
    )
    for column in ("variant", "parameters", "step, ms", "of the teacher", "the paper's ms", "the paper's share"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        paper = PAPER.get(row["variant"].split(",")[0], (0, 0.0))
        table.add_row(
            row["variant"],
            f"{row['parameters'] / 1e9:.2f} B",
            f"{1e3 * row['seconds']:.0f}",
            f"{100 * row['seconds'] / rows[0]['seconds']:.1f} %",
            str(paper[0]),
            f"{100 * paper[0] / PAPER['teacher'][0]:.1f} %",
        )
    out.print(table)
    rank = rank_step(transformer, blocks // 8 or 1)
    out.print(
        f"a distillation step of one rank of 8 ({rank['blocks']} blocks, {rank['students']} students, batch "
        f"{rank['batch']}): {1e3 * rank['seconds']:.0f} ms, {rank['peak_bytes'] / 1e9:.1f} GB"
    )
    return {
        "device": torch.cuda.get_device_name(),
        "blocks": blocks,
        "torch": torch.__version__,
        "steps": rows,
        "rank": rank,
    }


def rank_step(transformer: nn.Module, count: int, batch: int = 16) -> dict[str, Any]:
    """The teacher's blocks of one rank and a step of its students, on streams that are there."""
    adapter = adapter_of(transformer)
    mine = dict(enumerate(adapter.blocks(transformer)[:count]))
    intervals = [Interval(first, first + 3) for first in range(0, count - 3, 4)] or [Interval(0, count - 1)]
    transformer.cpu()
    for block in mine.values():
        block.cuda()
    for name, child in transformer.named_children():
        if name not in adapter.block_lists:
            child.cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    known = TeacherBlocks(adapter, transformer, mine, count)
    trainees = []
    for one in intervals:
        objective = new_objective(known, one, Distillation())
        objective.module.to("cuda")
        trainees.append(Trainee(objective, Distillation(), ParallelDims()))
    wanted = CaptureSpec()
    for trainee in trainees:
        wanted |= trainee.objective.capture
    start, context = embed(transformer, call(batch))

    def step() -> None:
        streams: Streams = start
        captured = CapturedActivations(context=context)
        with torch.no_grad():
            for number, block in mine.items():
                if number in wanted.boundaries:
                    captured.boundaries[number] = streams
                streams = adapter.from_returned(block(**adapter.join(streams, context)))
            captured.boundaries[count] = streams
        for trainee in trainees:
            trainee.train_step(captured, bfloat16=True)

    seconds = seconds_of(step)
    return {
        "blocks": count,
        "students": len(intervals),
        "batch": batch,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
