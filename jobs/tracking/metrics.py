"""What is logged of a job, by name: losses at a step of a stage, and what the stages found in the end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jobs.events import Event
from ppcl import __version__
from ppcl.config.schema import Config
from ppcl.replacements import parse_replacement
from ppcl.report.summary import rows_of
from ppcl.storage.results import Results

# The columns of the report's table that are numbers, by the stage that measures them.
_QUALITY = {
    "variants": ("parameters", "share", "blocks"),
    "evaluation": ("R", "velocity_error", "seconds_per_step", "speed_up", "psnr", "ssim", "world"),
}
_NAMES = {"world": "checker_score"}
# What trackers take in a name, the slash between its parts left out.
_OTHER = re.compile(r"[^\w.-]")


def metric_name(*parts: str) -> str:
    """`students/loss/ffn-3-50`: parts in characters that every tracker takes."""
    return "/".join(_OTHER.sub("-", part) for part in parts)


def losses(event: Event, values: Mapping[str, float]) -> dict[str, float]:
    """The running mean and the last losses by name of an event of a stage's progress; empty where it has none."""
    if event.kind != "progress" or event.stage is None or event.loss is None:
        return {}
    own = {metric_name(event.stage, "loss", name): value for name, value in values.items()}
    return _finite({metric_name(event.stage, "mean_loss"): event.loss, **own})


def recorded_losses(results: Results, stage: str, after: int) -> dict[int, dict[str, float]]:
    """By optimizer step, the losses that a stage's result has of the steps after one; empty where it has none."""
    found = results.stage(stage)
    curves = {"velocity": found["curve"]} if "curve" in found else {}
    curves |= {parse_replacement(text).name: made["curve"] for text, made in found.get("replacements", {}).items()}
    steps: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for point in curve:
            # In files the first step is number 0, in progress it is 1.
            if (step := int(point["step"]) + 1) > after:
                steps.setdefault(step, {})[metric_name(stage, "loss", name)] = point["loss"]
    return {step: _finite(steps[step]) for step in sorted(steps)}


def stage_metrics(results: Results, stage: str) -> dict[str, float]:
    """What a complete stage took and found: seconds, sensitivities, sizes and quality of the variants."""
    if stage not in results.manifest["stages"]:
        return {}
    metrics: dict[str, Any] = {metric_name("seconds", stage): results.manifest["stages"][stage]["seconds"]}
    if stage == "variants":
        sensitivities = results.stage("variants").get("damage", {})
        metrics |= {metric_name("sensitivity", name): value for name, value in sensitivities.items()}
    for row in rows_of(results) if stage in _QUALITY else ():
        metrics |= {
            metric_name("variants", row["variant"], _NAMES.get(column, column)): row[column]
            for column in _QUALITY[stage]
        }
    return _finite(metrics)


def parameters(config: Config) -> dict[str, Any]:
    """The configuration by dotted key; where it is tracked is no part of it."""
    values = config.model_dump(mode="json", exclude={"tracking"})
    return {"ppcl": __version__, **_flat(values)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = json.dumps(value) if isinstance(value, list | dict) else value
    return flat


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
