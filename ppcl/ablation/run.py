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
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ppcl.ablation import selection
from ppcl.ablation.gates import learned_gates
from ppcl.ablation.measure import RowMeasurer
from ppcl.ablation.sequential import SequentialRun
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config, Distillation, Finetuning
from ppcl.detection.fit_probes import tokens_file
from ppcl.detection.selection import cheapest, evenly, threshold
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements import (
    Interval,
    LinearFfn,
    LowRankModulation,
    PrunedFfn,
    Replacement,
    TextRun,
    conflicts,
    parse_replacement,
    sort_key,
)
from ppcl.replacements.io import files_in
from ppcl.search.error_model import ErrorModel
from ppcl.search.shortlist import best_depth_plans
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.run_context import RunContext

if TYPE_CHECKING:
    from diffusers import ModelMixin

# Held-out samples that choices by a measured error look at.
_LOOKED_AT = 64
_PLAN = "plan"
# Rows whose students are trained one after the other, and by which choice of intervals.
_IN_SEQUENCE = {"sensitivity": "sensitivity", "probes": "nonsequential"}


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
    Row("measured", "measured sensitivity in closed form", CHOICE),
    Row("threshold", "CKA threshold", CHOICE, 0.718),
    Row("equal", "intervals of one length", CHOICE),
    Row("uniform", "blocks spread evenly", CHOICE),
    Row("influence", "block influence (ShortGPT)", CHOICE),
    Row("gates", "learned gates (after TinyFusion)", CHOICE),
    Row("position", "position and error (after HierarchicalPrune)", CHOICE),
    Row("hidden", "+ text, half of the hidden units, low-rank modulations", OURS),
    Row("hidden_finetuned", "  the same, fine-tuned", OURS),
]
TEACHER_SCORE = 0.894
"""Of the paper's ablation, which is in the scores above."""


def ablated_blocks(config: Config, detection: Mapping[str, Any]) -> int:
    """How many blocks go: what was asked for, or two fifths, as in the paper, but not more than Algorithm 1 finds."""
    most = sum(last - first for first, last in detection["first_difference"])
    return config.ablation.removed or min(most, round(0.4 * detection["blocks"]))


@dataclass(frozen=True)
class AblationInputs:
    """What every seed of the ablation is made from, and where it runs.

    `probes`: the folder of the stage of that name. `detection`: the content of `detection.json`.
    """

    config: Config
    teacher: Teacher
    samples: CalibrationSet
    probes: Path
    detection: Mapping[str, Any]
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def distillation(self) -> Distillation:
        """Whole students in every row, everything trained, as in the paper."""
        settings, given = self.config.ablation, self.config.distillation
        return given.model_copy(
            update={
                "steps": settings.steps,
                "batch_size": settings.batch_size,
                "student_keep_percent": 100,
                "train": "all",
                "warmup": min(given.warmup, settings.steps // 10),
            }
        )

    def finetuning(self) -> Finetuning:
        """One plan is fine-tuned, and no other is measured."""
        settings, given = self.config.ablation, self.config.finetuning
        return given.model_copy(
            update={
                "steps": settings.finetuning_steps,
                "measured_plans": 0,
                "warmup": min(given.warmup, settings.finetuning_steps // 10),
                "plan": _PLAN,
                "train": "replacements",
                "variants": [],
            }
        )


def choices(
    inputs: AblationInputs, transformer: ModelMixin, seed: int, tell: Callable[[int], None]
) -> dict[str, list[Interval]]:
    """By row, the intervals of every way to choose. `tell(steps)` counts those of the learned gates."""
    config, calibration, detection = inputs.config, inputs.samples, inputs.detection
    block_ranges = [range(*span) for span in detection["spans"]]
    count, blocks = ablated_blocks(config, detection), detection["blocks"]
    if not count:
        raise UserError("Algorithm 1 finds no block that can go in this teacher; there is nothing to compare")
    boundaries = []
    for boundary in range(blocks + 1):
        tokens = load_file(tokens_file(inputs.probes, boundary))
        boundaries.append([tokens[name] for name in ("img", "txt") if name in tokens])
    similar = selection.adjacent_similarity(boundaries)
    ids = calibration.ids("train")[:_LOOKED_AT]
    batches = [calibration.batch(ids, transformer.device, transformer.dtype)]
    errors = selection.skip_errors(transformer, batches, lambda _: None)
    table = (detection.get("cka") or detection["cka_standardized"])[detection["stream"]]
    settings = config.ablation
    logits = learned_gates(transformer, calibration, count, settings.gate_steps, settings.batch_size, seed, tell)
    chosen = {
        "sensitivity": cheapest([-s for s in similar], count, block_ranges),
        "nonsequential": selection.algorithm1(detection["delta"], count, block_ranges),
        "threshold": threshold(table, count, block_ranges),
        "equal": selection.equal_lengths(count, block_ranges),
        "uniform": evenly(count, block_ranges),
        "influence": cheapest(selection.influence(boundaries), count, block_ranges),
        "gates": cheapest(logits, count, block_ranges),
        "position": cheapest(selection.by_position(errors), count, block_ranges),
    }
    if "measured" in detection:
        measured = detection["measured"]["sensitivity"]
        sensitivity = {parse_replacement(text): float(error) for text, error in measured.items()}
        plan = best_depth_plans(ErrorModel.additive(sensitivity), blocks, [count]).get(count, ())
        chosen["measured"] = [replacement for replacement in plan if isinstance(replacement, Interval)]
    return chosen


def plans_of(
    chosen: Mapping[str, list[Interval]], detection: Mapping[str, Any], ffns: int
) -> dict[str, list[Replacement]]:
    """By row, what is on, but for what differs in training alone."""
    plan: list[Replacement] = list(chosen["nonsequential"])
    known = [parse_replacement(text) for text in detection["plan"]]
    runs: list[Replacement] = []
    # Those of several layouts overlap.
    for run in sorted((e for e in known if isinstance(e, TextRun)), key=lambda run: -len(run.blocks)):
        if not any(conflicts(run, other) for other in (*plan, *runs)):
            runs.append(run)
    taken = {block for interval in plan for block in interval.blocks}
    errors = {int(block): error for block, error in detection["ffn_errors"].items() if int(block) not in taken}
    maps: list[Replacement] = [LinearFfn(block) for block in sorted(errors, key=errors.__getitem__)[:ffns]]
    halves: list[Replacement] = [PrunedFfn(block, 50) for block in sorted(errors)]
    rows: dict[str, list[Replacement]] = {name: list(intervals) for name, intervals in chosen.items()}
    rows["probes"] = plan
    rows["text"] = plan + runs
    rows["ffn"] = rows["finetuned"] = plan + runs + maps
    rows["hidden"] = rows["hidden_finetuned"] = plan + runs + halves + [LowRankModulation()]
    return {row.name: sorted(rows[row.name], key=sort_key) for row in ROWS if row.name in rows}


class _SeedProgress:
    """Counts the training steps and measured rows of one seed's parts as one total."""

    def __init__(self, parts: Sequence[int], report: Callable[[int, int], None]):
        self.parts, self.report = parts, report

    def of(self, part: int) -> Callable[..., None]:
        """A callback that counts what is done of one part."""

        def count(done: int, *_: Any, phase: str | None = None) -> None:
            # Plans that are measured before and after fine-tuning count as no step.
            if phase is None:
                self.report(sum(self.parts[:part]) + done, sum(self.parts))

        return count


def run_seed(inputs: AblationInputs, work: Path, seed: int, report: Callable[[int, int], None]) -> dict[str, Any]:
    """`{row: {velocity_error, R, world, share, plan}}` of one seed; what is trained on the way is left in `work`.

    `report(done, total)` counts training steps and measured rows.
    """
    config, teacher, samples, device = inputs.config, inputs.teacher, inputs.samples, inputs.device
    settings, steps, tuning = config.ablation, inputs.distillation(), inputs.finetuning()
    trainings = [steps.steps] * 3 + [tuning.steps] * 2
    progress = _SeedProgress([settings.gate_steps, *trainings, len(ROWS)], report)
    transformer = teacher.transformer(device=device, dtype=inputs.dtype)
    chosen = choices(inputs, transformer, seed, progress.of(0))
    del transformer
    plans = plans_of(chosen, inputs.detection, settings.ffns)
    shared = {replacement for name, plan in plans.items() if name not in _IN_SEQUENCE for replacement in plan}
    library = sorted(shared, key=sort_key)
    distil(
        teacher,
        samples,
        library,
        steps,
        RunContext(work / "library", work / "checkpoints", seed, device, report=progress.of(1)),
        config.width.modulation_error,
    )
    for part, (name, choice) in enumerate(_IN_SEQUENCE.items(), 2):
        run = SequentialRun(teacher, samples, steps, seed, device)
        run.distil(chosen[choice], work / name, progress.of(part))
    for part, name in enumerate(("finetuned", "hidden_finetuned"), 4):
        plan = plans[name]
        (work / name).mkdir(parents=True, exist_ok=True)
        files = {replacement: path for replacement, path in files_in(work / "library").items() if replacement in plan}
        finetune(
            teacher,
            samples,
            DistilledReplacements(files, {_PLAN: plan}, {}),
            tuning,
            RunContext(work / name, work / name / "checkpoints", seed, device, report=progress.of(part)),
            config.sampling,
        )
    folders = {name: work / (name if (work / name).is_dir() else "library") for name in plans}
    rows = RowMeasurer(inputs, seed)
    return rows.measure(plans, folders, files_in(work / "library"), progress.of(6))


def read_detection(path: Path) -> dict[str, Any]:
    """The content of `detection.json`."""
    return json.loads(path.read_text())
