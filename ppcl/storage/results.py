"""Read the JSON files of a job's stages, for reports and for serving."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.config.loading import rename_keys
from ppcl.config.location import LocationLike
from ppcl.config.schema import Config, Detection
from ppcl.errors import UserError
from ppcl.storage.manifest import CONFIG, Artifacts

STAGE_FILES = {
    "detection": "detection.json",
    "selection": "selection.json",
    "students": "training.json",
    "finetuning": "finetuning.json",
    "variants": "variants.json",
    "evaluation": "evaluation.json",
    "ablation": "ablation.json",
}


@dataclass(frozen=True)
class Results:
    """The parsed stage files. `stages`: those that could be read; `absent`: a sentence for each other one.

    A stage that the configuration does not run is in neither. `config`: the job's full configuration, `{}` where it
    cannot be read.
    """

    root: Path
    manifest: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    absent: dict[str, str]
    config: dict[str, Any]

    def stage(self, name: str) -> dict[str, Any]:
        """The content of a stage's file, or `{}` where it could not be read."""
        return self.stages.get(name, {})


def read_results(location: LocationLike) -> Results:
    """Read every stage that the manifest calls complete. Raises `UserError` where the location is no result."""
    artifacts = Artifacts(location)
    manifest, config = artifacts.manifest(), _config(artifacts)
    stages, absent = {}, {}
    for stage, name in STAGE_FILES.items():
        if stage not in manifest["stages"]:
            if stage != "selection" or _has_selection(config):
                absent[stage] = f"The stage {stage} has not run yet"
            continue
        try:
            stages[stage] = json.loads(artifacts.file(stage, name).read_text())
        except FileNotFoundError:
            absent[stage] = f"The file {stage}/{name} is missing (run the job again to make it)"
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            absent[stage] = f"The file {stage}/{name} cannot be read ({error}; run the job again to make it)"
    return Results(artifacts.root, manifest, stages, absent, config)


def _config(artifacts: Artifacts) -> dict[str, Any]:
    """The job's configuration with the keys of this version; `{}` where it cannot be read."""
    try:
        stored = json.loads(artifacts.text(CONFIG))
        return rename_keys(Config, stored)[0] if isinstance(stored, dict) else {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, UserError):
        return {}


def _has_selection(config: dict[str, Any]) -> bool:
    """Whether a job with this configuration chooses its intervals again after a short distillation."""
    detection = config.get("detection", {})
    try:
        # The version before had no methods.
        return "method" in detection and Detection.model_validate(detection).screens
    except ValueError:
        return False
