"""A finished job without the work: stage artifacts as a small compression leaves them, with images of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppcl.ablation.run import ROWS
from ppcl.config.schema import Config
from ppcl.demo import world
from ppcl.evaluation.benchmarks import Benchmark, mean_drops
from ppcl.storage.manifest import CONFIG, Artifacts
from ppcl.storage.results import STAGE_FILES

BLOCKS = 16
INTERVALS = [(1, 2), (4, 6), (7, 8), (9, 11), (13, 14)]
# What measured detection has besides: Algorithm 1's intervals, and the blocks of the longest one that is measured.
ALGORITHM = [(0, 2), (4, 6), (7, 8), (9, 14)]
LONGEST = 5
MEASURED = ("detection", "selection", "students", "variants", "evaluation")
VARIANTS = {"p90": (0.9, [1]), "p80": (0.8, [1, 3]), "p70": (0.7, [0, 1, 2, 3]), "all": (None, [0, 1, 2, 3, 4])}
PROMPTS = 12


def job(
    root: Path,
    stages: tuple[str, ...] = ("detection", "students", "variants", "evaluation"),
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A job's folder with those stages complete. `changes` replaces a stage's artifact by a function of it.

    `config`: sections of the configuration; without it, that of the artifact's method of detection.
    """
    rng = np.random.default_rng(0)
    artifacts = Artifacts(root)
    artifacts.start({"teacher": "/models/shapes-qwen", "teacher_sha256": "ab" * 32, "prompts": "cd" * 32})
    made = {"detection": detection(), "students": training(rng), "variants": variants(), "evaluation": evaluation(rng)}
    made |= {"finetuning": finetuning(rng), "ablation": ablation(), "selection": selection(), "scores": scores()}
    made |= {stage: change(made[stage]) for stage, change in changes.items()}
    sections = config or {"detection": {"method": made["detection"]["method"]}}
    full = Config(teacher="/models/shapes-qwen", prompts="prompts.txt", **sections)
    artifacts.path(CONFIG).write_text(full.model_dump_json())
    for index, stage in enumerate(stages):
        folder = artifacts.path(stage)
        folder.mkdir()
        content = made[stage]
        (folder / STAGE_FILES[stage]).write_text(json.dumps(content))
        if stage == "evaluation":
            pictures(folder / "pictures", content, rng)
        artifacts.commit(stage, key=f"{index:016x}", seconds=41.5 * 4**index)
    return artifacts.root


def table(sharp: float, shift: float) -> list[list[float | None]]:
    """CKA that falls with the distance, and faster across the borders between intervals."""
    border = np.full(BLOCKS, 2.2)
    for first, last in INTERVALS:
        border[first + 1 : last + 1] = np.linspace(1.0, 0.4, last - first)
    depth = np.cumsum(border)
    fallen = 1 - sharp * np.abs(depth[None] - depth[:, None] + shift * np.sin(np.arange(BLOCKS))) / depth[-1]
    np.fill_diagonal(fallen, 1)
    return [[float(fallen[u, k]) if k >= u else None for k in range(BLOCKS)] for u in range(BLOCKS)]


def detection() -> dict[str, Any]:
    cka = {"img": table(0.3, 0.2), "txt": table(0.08, 0.1), "mean": table(0.19, 0.15)}
    delta = [
        [None if k < u else 0.0 if k == u else cka["mean"][u][k - 1] - cka["mean"][u][k] for k in range(BLOCKS)]
        for u in range(BLOCKS)
    ]
    return {
        "blocks": BLOCKS,
        "spans": [[0, BLOCKS]],
        "stream": "mean",
        "standardize": False,
        "cka": cka,
        "cka_standardized": {"img": table(0.5, 0.2), "txt": table(0.3, 0.1), "mean": table(0.4, 0.1)},
        "delta": delta,
        "intervals": [list(pair) for pair in INTERVALS],
        "method": "first_difference",
        "plan": [f"{u}-{v}" for u, v in INTERVALS],
        "text_map": None,
    }


def measured(detection: dict[str, Any]) -> dict[str, Any]:
    """The same with the velocity error of every interval of up to `LONGEST` blocks: a change of stage detection.

    Algorithm 1 has one interval that is longer, and one that is distilled to the end.
    """
    sensitivity = {
        f"{u}-{v}": 0.002 * 3 ** (v - u) * (1 + np.sin(u) ** 2) * (0.3 if (u, v) in INTERVALS else 1)
        for u in range(BLOCKS)
        for v in range(u + 1, min(u + LONGEST, BLOCKS))
    }
    plans = {"1": ["13-14"], "3": ["7-8", "9-11"], "8": [f"{u}-{v}" for u, v in INTERVALS]}
    recurrence = {"1": {"13": 1.0, "15": 0.5}, "3": {"7": 0.94, "9": 0.8, "12": 0.0}}
    return {
        **detection,
        "method": "measured",
        "first_difference": [list(pair) for pair in ALGORITHM],
        "intervals": [list(pair) for pair in sorted([*INTERVALS, (2, 3), (5, 6)])],
        "measured": {"samples": 64, "sensitivity": sensitivity, "plans": plans, "recurrence": recurrence},
    }


def selection() -> dict[str, Any]:
    """The shortlist's sensitivities after the short distillation, in the order of those in closed form but for two."""
    sensitivity = {f"{u}-{v}": 0.001 * (v - u) + 0.0001 * u for u, v in [*INTERVALS, (2, 3), (5, 6)]}
    return {"plan": ["modulations", *(f"{u}-{v}" for u, v in INTERVALS)], "sensitivity": sensitivity}


def training(rng: np.random.Generator) -> dict[str, Any]:
    intervals = {}
    for index, (first, last) in enumerate(INTERVALS):
        steps = np.arange(0, 2000, 5)
        img = (0.1 + 0.05 * index) * (0.25 + np.exp(-steps / (200 + 60 * index))) * rng.lognormal(0, 0.08, len(steps))
        curve = [
            {"step": int(s), "loss": float(1.4 * a), "img": float(a), "txt": float(0.4 * a)} for s, a in zip(steps, img)
        ]
        intervals[f"{first}-{last}"] = {"curve": curve, "seconds": 341.2}
    return {"steps": 2000, "batch_size": 32, "start": "affine", "loss": "normalized", "replacements": intervals}


def finetuning(rng: np.random.Generator) -> dict[str, Any]:
    """Two variants and twenty plans, of which the first is worse behind it."""
    before = 0.002 * 30 ** rng.random(22)
    after = before * np.where(np.arange(22) == 0, 1.3, 0.3 + 0.4 * rng.random(22))
    names = ["p90", "p80", *[None] * 20]
    plans = [
        {"plan": ["1-2"], "variant": n, "before": b, "after": a, "taken": bool(a < b)}
        for n, b, a in zip(names, before, after, strict=True)
    ]
    plans[-1]["taken"], plans[-2]["after"] = False, 1.1 * plans[-2]["before"]
    curve = [{"step": s, "loss": 0.05 * 0.99**s, "entries": 4} for s in range(0, 300, 3)]
    return {"steps": 300, "fixed": False, "curve": curve, "skipped_steps": 0, "plans": plans}


def ablation() -> dict[str, Any]:
    """Errors within one decade, as those of a small teacher are."""
    rows = [
        {
            "name": row.name,
            "label": row.label,
            "group": row.group,
            "paper": row.paper,
            "share": 0.65 - 0.01 * index,
            "velocity_error": [0.02 + 0.006 * index, 0.019 + 0.005 * index, 0.021 + 0.007 * index],
            "R": [20.0 + index, 18.0 + index, 22.0 + index],
            "plans": ["1-2"] * 3,
        }
        for index, row in enumerate(ROWS)
    ]
    return {
        "seeds": 3,
        "steps": 200,
        "finetuning_steps": 100,
        "removed": 6,
        "blocks": BLOCKS,
        "confidence": 0.95,
        "rows": rows,
    }


def variants() -> dict[str, Any]:
    block, rest = 280_000, 330_000
    total = BLOCKS * block + rest
    made = {"teacher": {"plan": [], "parameters": total, "share": 1.0, "blocks": BLOCKS, "budget": None}}
    for name, (budget, on) in VARIANTS.items():
        intervals = [INTERVALS[i] for i in on]
        removed = sum(last - first for first, last in intervals)
        made[name] = {
            "plan": [f"{u}-{v}" for u, v in intervals],
            "parameters": total - removed * block,
            "share": (total - removed * block) / total,
            "blocks": BLOCKS - removed,
            "budget": budget,
        }
    return {
        "teacher": {"parameters": total, "blocks": BLOCKS, "spans": [[0, BLOCKS]]},
        "damage": {f"{u}-{v}": 0.012 * (v - u) for u, v in INTERVALS},
        "variants": made,
    }


def evaluation(rng: np.random.Generator) -> dict[str, Any]:
    measured = {}
    for index, name in enumerate(["teacher", *VARIANTS]):
        scores = {c: float(np.clip(0.93 - 0.055 * index - 0.04 * i, 0, 1)) for i, c in enumerate(world.CATEGORIES)}
        rows = {c: {"score": s, "low": max(0, s - 0.11), "high": min(1, s + 0.08)} for c, s in scores.items()}
        overall = sum(scores.values()) / len(scores)
        measured[name] = {
            "velocity_error": 0.021 * index**1.4,
            "velocity_by_timestep": [
                {"timestep": t, "error": 0.02 * index**1.4 * (0.5 + 2 * (t - 0.4) ** 2)}
                for t in np.linspace(0.05, 0.95, 10)
            ],
            "psnr": None if index == 0 else 31 - 3.2 * index,
            "ssim": None if index == 0 else 0.98 - 0.05 * index,
            "seconds_per_step": 0.082 * (1 - 0.11 * index),
            "world": {"overall": {"score": overall, "low": overall - 0.05, "high": overall + 0.04}, "categories": rows},
            "R": 6.1 * index,
            "R_low": 6.1 * index - 2.4 * (index > 0),
            "R_high": 6.1 * index + 2.8 * (index > 0),
        }
    chosen = [c for category in world.CATEGORIES for c in [x for x in world.captions() if x.category == category][3:5]]
    return {
        "variants": measured,
        "prompts": [{"text": caption.text, "category": caption.category} for caption in chosen[:PROMPTS]],
        "sampling": {"steps": 20, "height": world.CANVAS, "width": world.CANVAS, "arguments": {"true_cfg_scale": 3.0}},
        "device": "cpu",
    }


def scores() -> dict[str, Any]:
    """Two scorers on two suites: a reward whose mean is negative, and a distance to the teacher's images."""
    rng = np.random.default_rng(1)
    names = ["teacher", *VARIANTS]

    def of(scorer: str, suite: str, mean: float, step: float, better: bool = True) -> Benchmark:
        values = {name: {"": mean + i * step + rng.normal(0, abs(step), 60)} for i, name in enumerate(names)}
        return Benchmark(scorer, suite, values, better)

    made = [
        of("pick", "prompts", 21.0, -0.3),
        of("pick", "dpg", 20.0, -0.4),
        of("reward", "dpg", -0.2, -0.1),
        of("lpips", "dpg", 0.001, 0.05, better=False),
    ]
    return {"benchmarks": [one.record(0.95, 0) for one in made], "mean_drop": mean_drops(made, 0.95, 0)}


def pictures(folder: Path, content: dict[str, Any], rng: np.random.Generator) -> None:
    """A true image of each prompt for the teacher; the smaller a variant, the more often it draws another prompt's."""
    texts = [prompt["text"] for prompt in content["prompts"]]
    known = {caption.text for caption in world.captions()}
    for strength, name in enumerate(content["variants"]):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            continue
        for index, text in enumerate(texts):
            drawn = texts[(index + 1) % len(texts)] if rng.random() < 0.12 * strength else text
            drawn = drawn if drawn in known else "a photo of a red circle"
            path = folder / name / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(world.render(world.scene(drawn, rng))).save(path)
