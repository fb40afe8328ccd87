"""What a stage is given, for tests that run one without a job around it."""

from __future__ import annotations

import os
from pathlib import Path

from jobs.stage import JobIdentity, StageContext
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import StageFiles


def all_files(folder: Path) -> StageFiles:
    """A folder as if a manifest named all that lies in it."""
    found = [Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names]
    names = sorted(str(path.relative_to(folder)) for path in found)
    return StageFiles(folder, tuple(names))


def context(config: Config, folder: Path, events=lambda *progress, phase=None: None, **inputs: Path) -> StageContext:
    """`inputs`: the folder of each stage that is read."""
    teacher = Teacher(config.teacher)
    identity = JobIdentity.of(teacher, "prompts")
    files = {name: all_files(path) for name, path in inputs.items()}
    return StageContext(config, teacher, identity, files, folder, "cpu", events, "key")
