"""What a job's stages have left, read for those who show it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.config.loading import rename_keys
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.storage.manifest import CONFIG, Artifacts

STAGE_FILES = {
    "detection": "detection.json",
    "students": "training.json",
    "finetuning": "finetuning.json",
    "variants": "variants.json",
    "evaluation": "evaluation.json",
    "ablation": "ablation.json",
}


@dataclass(frozen=True)
class Results:
    """The parsed stage artifacts. `stages` holds those that could be read, `absent` says of each other one why not.

    `config`: the job's full configuration, `{}` where it cannot be read.
    """

    root: Path
    manifest: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    absent: dict[str, str]
    config: dict[str, Any]

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's artifact, or `{}` where it is not there."""
        return self.stages.get(name, {})


def read_results(root: Path) -> Results:
    """Read every stage that the manifest calls complete. Raises `UserError` where `root` is no job's folder."""
    artifacts = Artifacts(root)
    manifest = artifacts.manifest()
    stages, absent = {}, {}
    for stage, name in STAGE_FILES.items():
        if stage not in manifest["stages"]:
            absent[stage] = f"The stage {stage} has not run yet"
            continue
        try:
            stages[stage] = json.loads(artifacts.file(stage, name).read_text())
        except FileNotFoundError:
            absent[stage] = f"The file {stage}/{name} is gone (the job, run again, makes it anew)"
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            absent[stage] = f"The file {stage}/{name} cannot be read ({error}; the job, run again, makes it anew)"
    return Results(artifacts.root, manifest, stages, absent, _config(artifacts))


def _config(artifacts: Artifacts) -> dict[str, Any]:
    try:
        stored = json.loads(artifacts.text(CONFIG))
        return rename_keys(Config, stored)[0] if isinstance(stored, dict) else {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, UserError):
        return {}
