"""Read the JSON files of a job's stages, for reports and for serving."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl.config.loading import rename_keys
from ppcl.config.location import LocationLike
from ppcl.config.schema import Config, Detection
from ppcl.errors import UserError
from ppcl.storage.manifest import CONFIG, Artifacts, key_of, write_atomically

# A record in the manifest beside those of the stages.
GIVEN_SCORES = "given_scores"

STAGE_FILES = {
    "detection": "detection.json",
    "selection": "selection.json",
    "students": "training.json",
    "finetuning": "finetuning.json",
    "variants": "variants.json",
    "evaluation": "evaluation.json",
    "scores": "scores.json",
    "ablation": "ablation.json",
}


@dataclass(frozen=True)
class Results:
    """The parsed stage files. `stages`: those that could be read; `absent`: a sentence for each other one.

    A stage that the configuration does not run is in neither. `config`: the job's full configuration, `{}` where it
    cannot be read. `given_scores`: see `save_given_scores`, of the variants as they are.
    """

    root: Path
    manifest: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    absent: dict[str, str]
    config: dict[str, Any]
    given_scores: list[dict[str, Any]] = field(default_factory=list)

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
            if _is_run(stage, config):
                absent[stage] = f"The stage {stage} has not run yet"
            continue
        try:
            stages[stage] = json.loads(artifacts.file(stage, name).read_text())
        except FileNotFoundError:
            absent[stage] = f"The file {stage}/{name} is missing (run the job again to make it)"
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            absent[stage] = f"The file {stage}/{name} cannot be read ({error}; run the job again to make it)"
    return Results(artifacts.root, manifest, stages, absent, config, _given_scores(artifacts))


def made_of(artifacts: Artifacts) -> str:
    """A hash of the variants' plans and weights: scores that were given for others say nothing of these."""
    records = [artifacts.record(stage) for stage in ("students", "variants", "finetuning")]
    return key_of([record.digest if record else None for record in records])


def save_given_scores(artifacts: Artifacts, name: str, content: dict[str, Any]) -> None:
    """Keep what a scorer elsewhere gave, under its name, in place of what it gave before. Raises `UserError`."""
    if artifacts.damaged(GIVEN_SCORES):
        # What is damaged is gone; the others stay.
        artifacts.drop_record(GIVEN_SCORES)
    folder = artifacts.path(GIVEN_SCORES)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(content | {"made_of": made_of(artifacts)}, indent=1))
    artifacts.commit(GIVEN_SCORES, "given")


def _given_scores(artifacts: Artifacts) -> list[dict[str, Any]]:
    """Those of the variants as they are, without files that cannot be read."""
    record = artifacts.record(GIVEN_SCORES)
    if record is None:
        return []
    now, found = made_of(artifacts), []
    for name in sorted(record.files):
        with suppress(OSError, ValueError):
            content = json.loads(artifacts.file(*name.split("/")).read_text())
            if content["made_of"] == now:
                found.append(content)
    return found


def _is_run(stage: str, config: dict[str, Any]) -> bool:
    """Whether a job with this configuration runs a stage that others do without."""
    if stage == "scores":
        return bool(config.get("evaluation", {}).get("scorers"))
    return stage != "selection" or _has_selection(config)


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
