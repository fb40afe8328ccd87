"""One seed of the ablation: choose, train and measure every row, all with the same students, batches and steps.

All intervals of all ways to choose are distilled non-sequentially in ONE pass, as one library of students: nothing
crosses an interval's border, so what else is trained changes no student, and rows that share an interval share its
student.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppcl.ablation import selection
from ppcl.ablation.gates import learned_gates
from ppcl.ablation.sequential import distil_in_sequence
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.detection.fit_probes import tokens_file
from ppcl.errors import UserError
from ppcl.evaluation.prompt_checker import checker_prompts, correctness, load_checker
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.plan import (
    Ffn,
    Interval,
    LowRankModulation,
    Replacement,
    TextRun,
    conflicts,
    parse_replacement,
    sort_key,
)
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.run_context import RunContext

# Held-out samples that choices by a measured error look at.
_LOOKED_AT = 64
_PLAN = "plan"


@dataclass(frozen=True)
class Row:
    """`group`: the paper's ladder, another choice of blocks, or ours; `paper`: its score in the paper's ablation."""

    name: str
    label: str
    group: str
    paper: float | None = None


LADDER, CHOICE, OURS = "ladder", "choice of blocks", "ours"
ROWS = [
    Row("sensitivity", "CKA sensitivity, sequential", LADDER, 0.706),
    Row("probes", "+ linear probes", LADDER, 0.761),
    Row("nonsequential", "+ non-sequential", LADDER, 0.848),
    Row("text", "+ text streams to linear", LADDER, 0.860),
    Row("ffn", "+ FFNs to linear", LADDER, 0.850),
    Row("finetuned", "+ fine-tuning", LADDER, 0.870),
    Row("threshold", "CKA threshold", CHOICE, 0.718),
    Row("equal", "intervals of one length", CHOICE),
    Row("uniform", "blocks spread evenly", CHOICE),
    Row("influence", "block influence (ShortGPT)", CHOICE),
    Row("gates", "learned gates (after TinyFusion)", CHOICE),
    Row("position", "position and error (after HierarchicalPrune)", CHOICE),
    Row("hidden", "+ text, half of the hidden units, modulations folded", OURS),
    Row("hidden_finetuned", "  the same, fine-tuned", OURS),
]
TEACHER_SCORE = 0.894
"""Of the paper's ablation, which is in the scores above."""


def removed_blocks(config: Config, detection: Mapping[str, Any]) -> int:
    """How many blocks go: what was asked for, or two fifths, as in the paper, but not more than Algorithm 1 finds."""
    most = sum(last - first for first, last in detection["intervals"])
    return config.ablation.removed or min(most, round(0.4 * detection["blocks"]))


def choices(
    config: Config,
    transformer: Any,
    calibration: CalibrationSet,
    probes: Path,
    detection: Mapping[str, Any],
    seed: int,
    tell: Callable[[int], None],
) -> dict[str, list[Interval]]:
    """By row, the intervals of every way to choose. `tell(steps)` counts those of the learned gates."""
    block_ranges = [range(*span) for span in detection["spans"]]
    count, blocks = removed_blocks(config, detection), detection["blocks"]
    if not count:
        raise UserError("Algorithm 1 finds no block that can go in this teacher; there is nothing to compare")
    boundaries = []
    for boundary in range(blocks + 1):
        tokens = load_file(tokens_file(probes, boundary))
        boundaries.append([tokens[name] for name in ("img", "txt") if name in tokens])
    similar = selection.adjacent_similarity(boundaries)
    ids = calibration.ids(held_out=False)[:_LOOKED_AT]
    batches = [calibration.batch(ids, transformer.device, transformer.dtype)]
    errors = selection.skip_errors(transformer, batches, lambda _: None)
    table = detection["cka"][detection["stream"]]
    settings = config.ablation
    logits = learned_gates(transformer, calibration, count, settings.gate_steps, settings.batch_size, seed, tell)
    return {
        "sensitivity": selection.cheapest([-s for s in similar], count, block_ranges),
        "nonsequential": selection.algorithm1(detection["delta"], count, block_ranges),
        "threshold": selection.threshold(table, count, block_ranges),
        "equal": selection.equal_lengths(count, block_ranges),
        "uniform": selection.evenly(count, block_ranges),
        "influence": selection.cheapest(selection.influence(boundaries), count, block_ranges),
        "gates": selection.cheapest(logits, count, block_ranges),
        "position": selection.cheapest(selection.by_position(errors), count, block_ranges),
    }


def plans_of(
    chosen: Mapping[str, list[Interval]], detection: Mapping[str, Any], ffns: int
) -> dict[str, list[Replacement]]:
    """By row, what is on, but for what differs in training alone."""
    plan: list[Replacement] = list(chosen["nonsequential"])
    known = [parse_replacement(text) for text in detection["plan"]]
    runs = [e for e in known if isinstance(e, TextRun) and not any(conflicts(e, i) for i in plan)]
    taken = {block for interval in plan for block in interval.blocks}
    errors = {int(block): error for block, error in detection["ffn_errors"].items() if int(block) not in taken}
    maps = [Ffn(block) for block in sorted(errors, key=errors.__getitem__)[:ffns]]
    halves = [Ffn(block, 50) for block in sorted(errors)]
    rows: dict[str, list[Replacement]] = {name: list(intervals) for name, intervals in chosen.items()}
    rows["probes"] = plan
    rows["text"] = plan + runs
    rows["ffn"] = rows["finetuned"] = plan + runs + maps
    rows["hidden"] = rows["hidden_finetuned"] = plan + runs + halves + [LowRankModulation()]
    return {row.name: sorted(rows[row.name], key=sort_key) for row in ROWS}


def run_seed(
    config: Config,
    teacher: Teacher,
    samples: CalibrationSet,
    probes: Path,
    detection: Mapping[str, Any],
    work: Path,
    seed: int,
    device: str,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """`{row: {velocity_error, R, world, share, plan}}` of one seed. `report(done, total)` counts training steps."""
    settings = config.ablation
    steps = config.distillation.model_copy(
        # Whole students in every row, as in the paper.
        update={
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "student_keep_percent": 100,
            "train": "all",
            "warmup": min(config.distillation.warmup, settings.steps // 10),
        }
    )
    tuning = config.finetuning.model_copy(
        update={
            "steps": settings.finetuning_steps,
            "measured_plans": 0,
            "warmup": min(config.finetuning.warmup, settings.finetuning_steps // 10),
        }
    )
    parts = [settings.gate_steps, settings.steps, settings.steps, settings.steps, tuning.steps, tuning.steps]
    total = sum(parts) + len(ROWS)

    def telling(part: int) -> Callable[..., None]:
        def tell(done: int, *_: Any, phase: str | None = None) -> None:
            # Plans that are measured before and after count as no step.
            if phase is None:
                report(sum(parts[:part]) + done, total)

        return tell

    transformer = teacher.transformer(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    chosen = choices(config, transformer, samples, probes, detection, seed, telling(0))
    del transformer
    plans = plans_of(chosen, detection, settings.ffns)

    library = sorted(
        {replacement for name, plan in plans.items() if name not in ("sensitivity", "probes") for replacement in plan},
        key=sort_key,
    )
    distil(
        teacher,
        samples,
        library,
        steps,
        RunContext(work / "library", work / "checkpoints", seed, device, report=telling(1)),
        config.width.modulation_error,
    )
    for part, name in enumerate(("sensitivity", "probes"), 2):
        distil_in_sequence(teacher, samples, plans[name], steps, work / name, seed, device, telling(part))
    for part, name in enumerate(("finetuned", "hidden_finetuned"), 4):
        plan = plans[name]
        one = tuning.model_copy(update={"plan": _PLAN, "variants": []})
        (work / name).mkdir(parents=True, exist_ok=True)
        files = {replacement: path for replacement, path in files_in(work / "library").items() if replacement in plan}
        finetune(
            teacher,
            samples,
            DistilledReplacements(files, {_PLAN: plan}, {}),
            one,
            RunContext(work / name, work / name / "checkpoints", seed, device, report=telling(part)),
            config.sampling.steps,
        )
    folders = {row.name: work / (row.name if (work / row.name).is_dir() else "library") for row in ROWS}
    return _measure(
        config,
        teacher,
        samples,
        plans,
        files_in(work / "library"),
        folders,
        seed,
        device,
        lambda done: report(sum(parts) + done, total),
    )


@torch.no_grad()
def _measure(
    config: Config,
    teacher: Teacher,
    samples: CalibrationSet,
    plans: Mapping[str, Sequence[Replacement]],
    library: Mapping[Replacement, Path],
    folders: Mapping[str, Path],
    seed: int,
    device: str,
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """Measure every row. `library`: the replacements that rows share; a row's own folder takes precedence over it."""
    from ppcl.evaluation.images import generate_images
    from ppcl.evaluation.scoring import relative_drop

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = teacher.pipeline(device, dtype)
    evaluation = config.evaluation
    world = load_checker(evaluation.checker) if evaluation.checker else None
    prompts = checker_prompts(world, evaluation.max_prompts, config.seed) if world else []

    def shown(switch: VariantSwitcher, plan: Sequence[Replacement]) -> dict[str, Any]:
        switch(pipeline.transformer, plan)
        right: dict[str, list] = {}
        for start in range(0, len(prompts), evaluation.batch_size):
            some = prompts[start : start + evaluation.batch_size]
            seeds = [1_000_000 + config.seed + start + index for index in range(len(some))]
            pictures = generate_images(pipeline, [p.text for p in some], seeds, config.sampling)
            for category, found in correctness(world, pictures, some).items():
                right.setdefault(category, []).extend(found)
        switch(pipeline.transformer, ())
        return {category: torch.tensor(found, dtype=torch.float64).numpy() for category, found in right.items()}

    ids = samples.ids(held_out=True)
    teachers = shown(VariantSwitcher(teacher, {}), ()) if world else None
    made: dict[str, Any] = {}
    trained: dict[tuple, str] = {}
    for number, (name, plan) in enumerate(plans.items()):
        # The same plan of the same students is the same row.
        same = (folders[name], tuple(plan))
        if same in trained:
            made[name] = made[trained[same]]
            tell(number + 1)
            continue
        trained[same] = name
        files = {
            replacement: path
            for replacement, path in (library | files_in(folders[name])).items()
            if replacement in plan
        }
        switch = VariantSwitcher(teacher, files)
        batches = [ids[start : start + evaluation.batch_size] for start in range(0, len(ids), evaluation.batch_size)]
        squares = ErrorSums.joined(
            variant_errors(pipeline.transformer, switch, {name: plan}, samples.batch(batch, device, dtype))[name]
            for batch in batches
        )
        counted = parameter_counts(teacher, files)
        row = {
            "velocity_error": squares.overall(),
            "share": counted.parameters(plan) / counted.total,
            "plan": [str(e) for e in plan],
        }
        if world:
            found = shown(switch, plan)
            row["R"] = relative_drop(found, teachers, evaluation.confidence, seed)["R"]
            row["world"] = sum(float(p.mean()) for p in found.values()) / len(found)
        made[name] = row
        tell(number + 1)
    return made


def read_detection(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
