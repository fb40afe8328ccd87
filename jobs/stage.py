"""What a stage of a compression job is, and what it is given to work with.

A stage is a `Stage` in a module of its own under `jobs/stages`; `jobs.stages.registry.STAGES` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs.progress import Update
from ppcl.calibration.prompts import check_prompts
from ppcl.config.schema import Config, result_settings
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import CHECKPOINTS, StageFiles, key_of


@dataclass(frozen=True)
class JobIdentity:
    """Hashes of what a job reads from outside of its folder. `teacher_parts`: of every file of the other components.

    `teacher_versions`: by file of the teacher, what tells without reading it that it was not replaced.
    """

    teacher: str
    teacher_parts: Mapping[str, str]
    prompts: str
    teacher_versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: Teacher, prompts: str) -> JobIdentity:
        """`prompts`: the hash of the prompts."""
        # Before the files are read, so that one that is replaced meanwhile is noticed.
        versions = teacher.versions()
        return cls(teacher.sha256(), teacher.part_hashes(), prompts, versions)

    def confirmed(self, teacher: Teacher) -> JobIdentity:
        """The same, with the versions that files have now. Raises `UserError` where one has another content."""
        now = teacher.versions()
        names = sorted({*self.teacher_versions, *now})
        changed = [name for name in names if now.get(name) != self.teacher_versions.get(name)]
        if changed and not self._is_still(teacher):
            raise UserError(
                f"{teacher.place}/{changed[0]} was replaced during the job; what is complete is of the teacher as it "
                "was at the job's begin: put that one back and run the same command again, or choose another --output"
            )
        return replace(self, teacher_versions=now)

    def _is_still(self, teacher: Teacher) -> bool:
        try:
            again = Teacher(teacher.place)
            return again.sha256() == self.teacher and again.part_hashes() == dict(self.teacher_parts)
        except (UserError, OSError):
            return False


def prompts_hash(config: Config) -> str:
    """The hash of the calibration prompts that are used. Raises `UserError` where they cannot be read."""
    settings = config.calibration
    images = settings.image_column if settings.source == "images" else None
    return check_prompts(config.prompts, settings.prompt_column, images, settings.max_prompts)


@dataclass(frozen=True)
class WorkerContext:
    """What a worker on another node is given of a `StageContext`."""

    config: Config
    teacher: str
    inputs: Mapping[str, StageFiles]
    folder: Path
    checkpoints: Path
    device: str


@dataclass(frozen=True)
class StageContext:
    """What a stage works with.

    `inputs`: by name, the files of the stages it depends on. `folder`: for its own. `device`: cpu or cuda.
    `events(done, total, values)` reports its progress. `key`: what its result depends on, hashed.
    """

    config: Config
    teacher: Teacher
    identity: JobIdentity
    inputs: Mapping[str, StageFiles]
    folder: Path
    device: str
    events: Update
    key: str = ""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def checkpoints(self) -> Path:
        """The folder from which the same stage with the same key resumes."""
        return self.folder / CHECKPOINTS / self.key

    def for_workers(self) -> WorkerContext:
        return WorkerContext(self.config, self.teacher.place, self.inputs, self.folder, self.checkpoints, self.device)


class Workers(NamedTuple):
    """The number of workers of a stage, and the configuration key that sets it. `least`: the fewest it can run with."""

    number: int
    setting: str
    least: int | None = None


def _nothing(context: StageContext) -> list[Any]:
    return []


@dataclass(frozen=True)
class Stage:
    """One stage of a job. Its result depends on what `key` hashes, and on nothing else.

    `run(context)` fills the stage's folder and gives the manifest's info, of which `notes` are logged at its end.
    `depends_on`: the stages whose files it reads. `reads`: by stage, a glob pattern where it does not read all of them.
    `sections`: of the configuration.
    `check(context)`: called before the stage is run or skipped; gives lines for the log and raises `UserError` for what
    would fail much later.
    `also_reads(context)`: hashes of what it reads beside the files of stages.
    `resumes_from`: a folder in its own that survives a failure. `format`: of its files; an incompatible change raises
    it.
    """

    name: str
    run: Callable[[StageContext], dict[str, Any]]
    describe: Callable[[StageContext], str]
    depends_on: tuple[str, ...] = ()
    reads: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    workers: Callable[[Config], Workers] | None = None
    enabled: Callable[[Config], bool] = lambda config: True
    check: Callable[[StageContext], list[str]] = _nothing
    also_reads: Callable[[StageContext], list[Any]] = _nothing
    resumes_from: str | None = None
    format: int = 1

    def key(self, context: StageContext) -> str:
        """The hash of everything the stage's result depends on."""
        config = context.config
        return key_of(
            self.name,
            self.format,
            context.identity.teacher,
            context.seed,
            context.device,
            {name: files.digest for name, files in context.inputs.items()},
            {section: result_settings(getattr(config, section)) for section in self.sections},
            self.also_reads(context),
        )


def stages_for(target: str, stages: Iterable[Stage]) -> list[Stage]:
    """A stage and all that it depends on, in the order of the list, which has dependencies first."""
    stages = list(stages)
    needed = {target}
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.depends_on)
    return [stage for stage in stages if stage.name in needed]
