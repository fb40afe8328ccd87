"""The coordinator: the stages of a compression job, in order, each run only when its result is not there and intact.

    calibration → probes → detection → students → variants → finetuning → evaluation → report

Every stage has a key, a hash of the configuration it reads and of the keys of the stages before it. See
`ppcl.storage.manifest` for what makes a stage complete.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.progress import Reporter, Update, duration
from ppcl.config.schema import Config
from ppcl.errors import UserError, cannot_write
from ppcl.models.teacher import Teacher
from ppcl.replacements.plan import Ffn, Interval, LowRankModulation, TextRun, parse_replacement
from ppcl.search.variants import names_of
from ppcl.storage.manifest import CONFIG, LOG, Artifacts, key_of, write_atomically
from ppcl.storage.mirror import local_file, upload
from ppcl.storage.node_cache import file_sha256
from ppcl.training.finetuning.plan_sampler import plan_sampler

# A stage is tried so often before its failure is the user's.
_ATTEMPTS = 3

# Keys that say how a stage is run and not what comes out of it.
_OPERATIONAL = {
    "calibration": {"workers", "batch_size"},
    "probes": {"workers"},
    "distillation": {"pipeline", "replicas", "checkpoint_every"},
    "finetuning": {"replicas", "checkpoint_every", "recompute"},
    "evaluation": {"workers"},
    "ablation": {"workers"},
}


@dataclass(frozen=True)
class Stage:
    """`run(folder, update, key)` fills the stage's folder and gives the manifest's info, of which the `notes` are told at its end;
    `key` is what it depends on."""

    name: str
    what: str
    depends: list[Any]
    run: Callable[[Path, Update, str], dict[str, Any]]
    # A stage that continues from its own checkpoints keeps what lies in its folder.
    keeps_checkpoints: bool = False


def _settings(config: Config, section: str) -> dict[str, Any]:
    values = getattr(config, section).model_dump(mode="json")
    return {k: v for k, v in values.items() if k not in _OPERATIONAL.get(section, set())}


class Job:
    """One compression job in its output folder."""

    def __init__(self, config: Config, console: Console):
        """Look at everything the job reads, before anything is started or written. Raises `UserError`."""
        from ppcl.calibration.prompts import check_prompts

        self.config = config
        names_of(config.variants)
        self.artifacts = Artifacts(config.output)
        self.artifacts.check()
        column = config.calibration.prompt_column
        images = config.calibration.image_column if config.calibration.source == "images" else None
        self.prompts_hash = check_prompts(config.prompts, column, images, config.calibration.limit)
        if config.evaluation.prompts is not None:
            check_prompts(config.evaluation.prompts, column, None, config.evaluation.limit, different=1)
        self.teacher = Teacher(config.teacher)
        self.teacher_hash = self.teacher.sha256()
        identity = {"teacher": self.teacher.place, "teacher_sha256": self.teacher_hash, "prompts": self.prompts_hash}
        self.artifacts.start(identity)
        self.reporter = Reporter(console, self.artifacts.path(LOG))
        # Once there is a Ray to ask.
        self._tell_of_nodes: Callable[[str], None] = lambda stage: None

    def stages(self, device: str, ablation: bool = False) -> Iterator[Stage]:
        """The stages in order. Later ones read what earlier ones left, so they are made one at a time.

        `ablation`: it stands in the place of everything behind the detection.
        """
        from jobs.stages.ablation import ablate
        from jobs.stages.calibration import calibrate
        from jobs.stages.distillation import distil_plan
        from jobs.stages.evaluation import choose_variants, evaluate
        from jobs.stages.finetuning import finetune_replacements
        from jobs.stages.probes import detect, fit_probes

        config, path = self.config, self.artifacts.path
        calibration = path("calibration")
        sampling = _settings(config, "sampling")
        # The states are the teacher's own, in the precision of the device that makes them.
        teacher = [self.teacher_hash, self.teacher.part_hashes()]
        base = [*teacher, self.prompts_hash, config.seed, sampling, _settings(config, "calibration"), device]
        yield Stage(
            "calibration",
            "prompts are encoded and the teacher's states on their trajectories kept",
            base,
            # The device is settled: there may be no GPU yet where there was none when it was.
            lambda folder, update, key: calibrate(
                config.model_copy(update={"device": device}), self.teacher, folder, update
            ),
        )
        base = [*base, _settings(config, "probes")]
        yield Stage(
            "probes",
            "one affine map a block and stream, in closed form",
            base,
            lambda folder, update, key: fit_probes(config, self.teacher, calibration, folder, device, update),
        )
        base = [*base, _settings(config, "detection"), _settings(config, "width")]
        yield Stage(
            "detection",
            "CKA of every interval, the contiguous redundant ones, and the text runs and FFNs that can go",
            base,
            lambda folder, update, key: detect(config, self.teacher, path("probes"), folder, update),
        )
        if ablation:
            yield Stage(
                "ablation",
                f"{config.ablation.seeds} seeds, {config.ablation.steps} distillation steps each",
                [
                    *base,
                    *(
                        _settings(config, section)
                        for section in ("distillation", "finetuning", "evaluation", "ablation")
                    ),
                ],
                lambda folder, update, key: ablate(
                    config,
                    self.teacher,
                    calibration,
                    path("probes"),
                    path("detection", "detection.json"),
                    folder,
                    device,
                    key,
                    update,
                ),
                keeps_checkpoints=True,
            )
            return
        found = json.loads(path("detection", "detection.json").read_text())
        plan = [parse_replacement(text) for text in found["plan"]]
        self._tell(plan, found["blocks"])
        if not plan:
            raise UserError(
                "nothing redundant was found: no interval, text run or FFN of this teacher can be replaced; nothing to compress"
            )
        if config.finetuning.steps:
            # Which plans the variants have is not known yet; that they have one is all that can be looked at here.
            names = dict.fromkeys(names_of(config.variants), plan)
            plan_sampler(config.finetuning, plan, names, [range(*span) for span in found["spans"]])
        base = [*base, found["plan"], _settings(config, "distillation")]
        yield Stage(
            "students",
            f"{len(plan)} replacements, {config.distillation.steps} steps",
            base,
            lambda folder, update, key: distil_plan(
                config, self.teacher, calibration, plan, folder, device, key, update
            ),
            keeps_checkpoints=True,
        )
        base = [*base, _settings(config, "variants")]
        yield Stage(
            "variants",
            "the sensitivity of every replacement, and the variants of the budgets",
            base,
            lambda folder, update, key: choose_variants(
                config, self.teacher, calibration, path("students"), folder, device, update
            ),
        )
        finetuning = path("finetuning") if config.finetuning.steps else None
        if config.finetuning.steps:
            variants = self.artifacts.entry("variants").key
            base = [*base, _settings(config, "finetuning")]
            yield Stage(
                "finetuning",
                f"replacements end to end, {config.finetuning.steps} steps",
                base,
                lambda folder, update, key: (
                    finetune_replacements(
                        config,
                        self.teacher,
                        calibration,
                        path("students"),
                        path("variants"),
                        folder,
                        device,
                        key,
                        update,
                    )
                    | {"variants": variants}
                ),
                keeps_checkpoints=True,
            )
        else:
            # One from before would go on being the result's.
            self.artifacts.forget("finetuning")
        asked = config.evaluation.prompts
        base = [*base, _settings(config, "evaluation"), asked and file_sha256(local_file(asked))]
        yield Stage(
            "evaluation",
            "velocity errors and pictures of every variant",
            base,
            lambda folder, update, key: evaluate(
                config,
                self.teacher,
                calibration,
                path("students"),
                path("variants"),
                finetuning,
                folder,
                device,
                update,
            ),
        )

    def _tell(self, plan: list[Any], blocks: int) -> None:
        kinds = {"intervals": Interval, "text runs": TextRun, "FFNs": Ffn, "for all blocks": LowRankModulation}
        for what, kind in kinds.items():
            entries = [entry for entry in plan if isinstance(entry, kind)]
            if entries:
                removed = sum(entry.removed for entry in entries)
                gone = f", {removed} of {blocks} blocks can go" if kind is Interval else ""
                self.reporter.say(f"detection: {len(entries)} {what}{gone}: {' '.join(map(str, entries))}")

    def run(self, device: str, ablation: bool = False) -> str:
        """Run what is missing, for the result or for the ablation; gives where the report is. The same call again skips what is complete and intact."""
        from ppcl.report import write_report

        artifacts = self.artifacts
        self._tell_of_nodes = lambda stage: self._tell_of_missing_nodes(device, stage)
        with artifacts.alone(), self._log():
            self._check_resources(device)
            write_atomically(artifacts.path(CONFIG), self.config.model_dump_json(indent=1))
            upload(artifacts.path(CONFIG))
            for stage in self.stages(device, ablation):
                self._run_stage(stage)
            report = write_report(artifacts.root)
            return f"{artifacts.place}/{report.name}"

    @contextmanager
    def _log(self) -> Iterator[None]:
        """What earlier runs said before what this one says, and published however it ends."""
        self.artifacts.continue_log()
        try:
            yield
        finally:
            # A store that does not answer has been told of.
            with suppress(UserError):
                upload(self.artifacts.path(LOG))

    def _needs(self) -> dict[str, tuple[int, str]]:
        """By stage: its workers, and the key that asks for them."""
        config = self.config
        return {
            "calibration": (config.calibration.workers, "calibration.workers"),
            "probes": (config.probes.workers, "probes.workers"),
            "students": (
                config.distillation.pipeline * config.distillation.replicas,
                "distillation.pipeline × distillation.replicas",
            ),
            "variants": (config.evaluation.workers, "evaluation.workers"),
            "finetuning": (config.finetuning.replicas if config.finetuning.steps else 1, "finetuning.replicas"),
            "evaluation": (config.evaluation.workers, "evaluation.workers"),
            "ablation": (config.ablation.workers, "ablation.workers"),
        }

    def _check_resources(self, device: str) -> None:
        """All stages' workers, before the first stage: not after hours of work."""
        from jobs.runtime.resources import refuse_impossible

        refuse_impossible(self._needs().values(), device)

    def _tell_of_missing_nodes(self, device: str, stage: str) -> None:
        from jobs.runtime.resources import shortfall

        if stage not in (needs := self._needs()):
            return
        workers, key = needs[stage]
        # Calibration goes on with whatever places there are.
        if told := shortfall(1 if stage == "calibration" else workers, device, key):
            self.reporter.say(
                f"{stage}: waiting for nodes, {duration(self.config.patience)} from the last sign of one: {told}"
            )

    def _survived(self, stage: Stage, update: Update, key: str) -> dict[str, Any]:
        """What the stage tells; one that loses a worker or a node goes on from its checkpoints, or begins again, a few times.

        Raises `UserError`, for what no repetition can mend at once.
        """
        artifacts = self.artifacts
        for attempt in range(1, _ATTEMPTS + 1):
            if stage.keeps_checkpoints:
                artifacts.forget_entry(stage.name)
            else:
                artifacts.forget(stage.name)
            folder = artifacts.path(stage.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._tell_of_nodes(stage.name)
            try:
                return stage.run(folder, update, key)
            except UserError:
                raise
            except Exception as error:
                if cannot_write(error):
                    raise
                reason = _reason(error)
                with open(artifacts.path(LOG), "a", encoding="utf-8") as log:
                    log.writelines(traceback.format_exception(error))
            if attempt < _ATTEMPTS:
                self.reporter.say(
                    f"{stage.name}: failed ({reason}); trying again from what is complete, {attempt} of {_ATTEMPTS - 1} times"
                )
        raise UserError(
            f"{stage.name} failed {_ATTEMPTS} times, the last time for {reason}; {LOG} in {artifacts.place} has all of it; what is "
            "complete is kept, and the same command continues"
        )

    def _run_stage(self, stage: Stage) -> None:
        artifacts, key = self.artifacts, key_of(stage.name, stage.depends)
        if artifacts.state(stage.name, key, self.reporter.say):
            self.reporter.say(f"{stage.name}: complete, skipped")
            return
        begun = time.monotonic()
        with self.reporter.stage(stage.name, stage.what) as update:
            info = self._survived(stage, update, key)
        artifacts.commit(stage.name, key, time.monotonic() - begun, info)
        upload(artifacts.path(LOG))
        for note in info.get("notes", ()):
            self.reporter.say(note)


def _reason(error: BaseException) -> str:
    """The last line of what a worker or Ray says, which is the error itself; what comes before is where it happened."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return lines[-1][:300] if lines else type(error).__name__
