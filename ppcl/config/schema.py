"""The configuration of a compression job: every key, its default and its meaning.

A default stands on its field and nowhere else: here, and in the modules of `ppcl.config.sections`.

`ppcl config` prints the defaults with their descriptions as YAML. Errors name the key, the value seen and what
is right.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from ppcl.config.checks import check_config
from ppcl.config.loading import Section, commented, current_keys, put, read_values, validated
from ppcl.config.location import Location, LocationLike
from ppcl.config.sections.detection import Detection, Probes, Width
from ppcl.config.sections.evaluation import Ablation, Evaluation, ScorerSettings
from ppcl.config.sections.fields import OPERATIONAL
from ppcl.config.sections.memory import Memory
from ppcl.config.sections.samples import Calibration, Sampling
from ppcl.config.sections.tracking import MlflowTracking, Tracking, WandbTracking
from ppcl.config.sections.training import Distillation, Finetuning
from ppcl.config.sections.variants import Target, Variants
from ppcl.errors import UserError

__all__ = [
    "Ablation",
    "Calibration",
    "Config",
    "Detection",
    "Distillation",
    "Evaluation",
    "Finetuning",
    "Memory",
    "MlflowTracking",
    "OPERATIONAL",
    "Probes",
    "Sampling",
    "ScorerSettings",
    "Target",
    "Tracking",
    "Variants",
    "WandbTracking",
    "Width",
    "commented_defaults",
    "load_config",
    "result_settings",
]


class Config(Section):
    """A compression job."""

    renamed: ClassVar[dict[str, str]] = {"patience": "worker_timeout_s"}

    teacher: Location = Field(..., description="folder of a diffusers pipeline, or s3://bucket/key")
    prompts: Location = Field(
        ...,
        description="calibration prompts: .txt (one per line), .jsonl, .csv, .parquet or a folder of .parquet files; a "
        "path or s3://bucket/key",
    )
    output: Location = Field(Location("runs/ppcl"), description="folder of the result, or s3://bucket/key")
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one or the cluster's autoscaler can add one, else the CPU"
    )
    worker_timeout_s: float = Field(
        300.0,
        gt=0,
        description="seconds without a heartbeat after which a worker is killed, and for which a stage waits for "
        "missing nodes; up to "
        "four times as long while the cluster's autoscaler starts nodes",
    )
    busy_timeout_s: float = Field(
        3600.0,
        gt=0,
        description="seconds for which a stage waits for CPUs or GPUs that other jobs of the cluster use",
    )
    memory: Memory = Memory()
    sampling: Sampling = Sampling()
    calibration: Calibration = Calibration()
    probes: Probes = Probes()
    detection: Detection = Detection()
    width: Width = Width()
    distillation: Distillation = Distillation()
    finetuning: Finetuning = Finetuning()
    variants: Variants = Variants()
    evaluation: Evaluation = Evaluation()
    ablation: Ablation = Ablation()
    tracking: Tracking = Tracking()


def result_settings(section: Section) -> dict[str, Any]:
    """The values of a section that its results depend on: all but those marked operational, as JSON has them."""
    fields = type(section).model_fields
    operational = {name for name, field in fields.items() if field.json_schema_extra == OPERATIONAL}
    return section.model_dump(mode="json", exclude=operational)


def load_config(path: str | Path, overrides: list[str] | None = None, output: LocationLike | None = None) -> Config:
    """Read a YAML file; `overrides` are `key.sub=value` with YAML values. Relative paths are relative to the file.

    Raises `UserError` that names the key, the value seen and what would be right.
    """
    path = Path(path)
    values = read_values(Config, path, "ppcl config")
    values = current_keys(Config, values, str(path))
    _resolve_paths(values, path.absolute().parent)
    for override in overrides or []:
        put(Config, values, override, "distillation.steps=100")
    if output is not None:
        values["output"] = str(output)
    config = validated(Config, values, str(path))
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _resolve_paths(values: dict[str, Any], base: Path) -> None:
    """The file's own relative paths are relative to the file; `output` is relative to where the command runs."""
    places = [(values, "teacher"), (values, "prompts")]
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict):
        places.append((evaluation, "prompts"))
        suites = evaluation.get("suites")
        if isinstance(suites, dict):
            places += [(suites, name) for name in suites]
    for section, key in places:
        if isinstance(section.get(key), str):
            # What is no location keeps its text, for the message that says so.
            with suppress(ValueError):
                location = Location(section[key])
                section[key] = str(location if location.is_url else base / location)


def commented_defaults() -> str:
    """The full default configuration as YAML, every key described."""
    return commented(Config)
