"""A compression job: its stages in order, each run only when its result is not there and intact.

    calibration → probes → detection → students → variants → finetuning → evaluation → scores → report

See `jobs.stage` for what a stage is and what its result depends on, `jobs.stages.registry` for the list of them, and
`ppcl.storage.manifest` for what makes a stage complete.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.failures import advice, describe_failure, will_recur
from jobs.progress import Reporter, duration
from jobs.stage import JobIdentity, Stage, StageContext, prompts_hash, stages_for
from jobs.tracking.listener import tracked, trackers_of
from ppcl.calibration.prompts import check_prompts, count_prompts
from ppcl.calibration.sampling_checks import check_sampling
from ppcl.config.plan_defaults import INTERVAL
from ppcl.config.schema import Config
from ppcl.errors import UserError, cannot_write
from ppcl.evaluation.suites import configured_prompts
from ppcl.models import check_calibration
from ppcl.models.teacher import Teacher
from ppcl.models.weight_checks import check_weights
from ppcl.report import write_report
from ppcl.search.checks import check_variants
from ppcl.storage.atomic import remove_partials
from ppcl.storage.manifest import CACHE, CONFIG, EVENTS, LOG, Artifacts, write_atomically
from ppcl.storage.mirror import remove, upload

if TYPE_CHECKING:
    from ppcl.sizing.job import JobSize

# The last stage: a job runs all that it depends on.
_LAST = "scores"
# A stage is tried so often before its failure is the user's.
_ATTEMPTS = 3


class Job:
    """One compression job in its output folder."""

    def __init__(self, config: Config, console: Console):
        """Check everything the job reads, before anything is started or written. Raises `UserError`."""
        self.config = config
        self.artifacts = Artifacts(config.output)
        self._trackers = trackers_of(config)
        known = self.artifacts.job()
        prompts = prompts_hash(config)
        if config.evaluation.prompts is not None:
            check_prompts(
                config.evaluation.prompts,
                config.calibration.prompt_column,
                limit=config.evaluation.max_prompts,
                different=1,
            )
        configured_prompts(config)  # refuses a suite that cannot be read
        self.teacher = Teacher(config.teacher, known.get("teacher_hashes"))
        check_calibration(self.teacher.adapter, self.teacher.pipeline_class)
        check_weights(self.teacher.files)
        check_sampling(self.teacher, config.sampling)
        check_variants(config.variants, self.teacher.adapter.block_ranges(self.teacher.empty_transformer()))
        if unread := self.teacher.bytes_without_sha256():
            console.print(
                f"reading {unread / 1e9:.1f} GB of weights in {self.teacher.place} once, which have no sha256 there",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self.identity = JobIdentity.of(self.teacher, prompts)
        self.artifacts.start(self._record())
        self.reporter = Reporter(console, self.artifacts.path(LOG))

    def _record(self) -> dict[str, Any]:
        """What the manifest says of the job."""
        record = {
            "teacher": self.teacher.place,
            "teacher_sha256": self.identity.teacher,
            "prompts": self.identity.prompts,
        }
        return record | ({"teacher_hashes": self.teacher.hashes} if self.teacher.hashes else {})

    def run(self, device: str, ablation: bool = False, check_memory: bool = True) -> str:
        """Run the stages whose result is not complete and intact, then write the report; gives where that is.

        `ablation`: instead of everything after detection. `check_memory`: refuse what does not fit the devices, by an
        estimate made before anything is run. Raises `UserError`.
        """
        # Not before the caller has connected to Ray, which reads its environment when it is imported.
        from jobs.stages.registry import STAGES

        artifacts = self.artifacts
        stages = stages_for("ablation" if ablation else _LAST, STAGES)
        tracking = tracked(self._trackers, self.config, artifacts, self.reporter)
        with artifacts.exclusive_lock(), self._log(), tracking, self._last_event():
            remove_partials(artifacts.root)
            artifacts.update_job(self._record())
            if note := self.teacher.few_step_note(self.config.sampling.steps):
                self.reporter.say(note)
            self._check_resources(stages, device)
            if check_memory:
                self._check_memory(stages, device)
            if not ablation:
                self._check_scorers()
            write_atomically(artifacts.path(CONFIG), self.config.model_dump_json(indent=1))
            upload(artifacts.path(CONFIG))
            enabled = [stage for stage in stages if stage.enabled(self.config)]
            for stage in stages:
                if stage in enabled:
                    self.run_stage(stage, device, enabled.index(stage) + 1, len(enabled))
                else:
                    # One from before would go on being the result's.
                    artifacts.invalidate(stage.name)
            report = f"{artifacts.place}/{write_report(artifacts.root).name}"
            self.reporter.job_done(report)
            return report

    def run_stage(self, stage: Stage, device: str, index: int = 1, stages: int = 1) -> None:
        """Run stage number `index` of `stages`, unless its result is complete and intact. Raises `UserError`."""
        artifacts, context = self.artifacts, self._context(stage, device)
        for line in stage.check(context):
            self.reporter.say(line)
        if artifacts.is_complete(stage.name, context.key, stage.format, self.reporter.say):
            self.reporter.skipped(stage.name, index, stages)
            return
        started_at = time.monotonic()
        with (
            self.reporter.stage(stage.name, stage.describe(context), index, stages) as update,
            self._one_teacher(stage),
        ):
            info = self._with_retries(stage, replace(context, events=update))
            # Whoever hears that the stage is done finds its files.
            artifacts.commit(stage.name, context.key, time.monotonic() - started_at, info, stage.format)
        self._upload_log()
        for note in info.get("notes", ()):
            self.reporter.say(note)

    @contextmanager
    def _one_teacher(self, stage: Stage) -> Iterator[None]:
        """Refuse a teacher that was replaced, before a stage and after it. Raises `UserError`; keeps nothing of it."""
        self.identity = self.identity.confirmed(self.teacher)
        try:
            yield
        finally:
            # Also where the stage failed: that may be why.
            try:
                self.identity = self.identity.confirmed(self.teacher)
            except UserError:
                self.artifacts.invalidate(stage.name)
                remove(self.artifacts.path(CACHE))
                raise

    def _context(self, stage: Stage, device: str) -> StageContext:
        artifacts = self.artifacts
        inputs = {
            name: artifacts.stage_files(name, stage.reads.get(name, "*"))
            for name in stage.depends_on
            if artifacts.record(name) is not None
        }
        context = StageContext(
            self.config, self.teacher, self.identity, inputs, artifacts.path(stage.name), device, _unheard
        )
        return replace(context, key=stage.key(context))

    def _with_retries(self, stage: Stage, context: StageContext) -> dict[str, Any]:
        """Run a stage; one that loses a worker or a node resumes from its checkpoints, or starts again, a few times.

        Raises `UserError`, at once for what no repetition can mend.
        """
        artifacts = self.artifacts
        for attempt in range(1, _ATTEMPTS + 1):
            artifacts.invalidate(stage.name, keep=stage.resumes_from)
            remove_partials(context.folder)
            context.folder.mkdir(parents=True, exist_ok=True)
            self._wait_for_resources(stage, context)
            try:
                return stage.run(context)
            except UserError:
                raise
            except Exception as error:
                if cannot_write(error):
                    raise
                reason = describe_failure(error)
                with open(artifacts.path(LOG), "a", encoding="utf-8") as log:
                    log.writelines(traceback.format_exception(error))
                if will_recur(error):
                    raise UserError(
                        f"{stage.name} failed for {reason}; trying again would not help: {advice(error)}; {LOG} in "
                        f"{artifacts.place} has all of it; what is complete is kept"
                    ) from error
            if attempt < _ATTEMPTS:
                self.reporter.say(
                    f"{stage.name}: failed ({reason}); trying again from what is complete, {attempt} of "
                    f"{_ATTEMPTS - 1} times"
                )
        raise UserError(
            f"{stage.name} failed {_ATTEMPTS} times, the last time for {reason}; {LOG} in {artifacts.place} has all of "
            "it; what is complete is kept, and the same command continues"
        )

    @contextmanager
    def _log(self) -> Iterator[None]:
        """Continue the log of earlier runs, and upload it however this one ends."""
        self.artifacts.continue_log()
        try:
            yield
        finally:
            # A store that does not answer has been reported already.
            with suppress(UserError):
                self._upload_log()

    def _upload_log(self) -> None:
        for name in (LOG, EVENTS):
            if self.artifacts.path(name).exists():
                upload(self.artifacts.path(name))

    @contextmanager
    def _last_event(self) -> Iterator[None]:
        """What ends the job before its report is its last event; a stopped job has not failed."""
        try:
            yield
        except KeyboardInterrupt:
            with suppress(OSError):
                self.reporter.job_stopped()
            raise
        except Exception as error:
            # A full disk takes no event; the error itself counts.
            with suppress(OSError):
                self.reporter.job_failed(" ".join(str(error).split()) or type(error).__name__)
            raise

    def _check_resources(self, stages: Iterable[Stage], device: str) -> None:
        """Check all stages' workers before the first stage, not after hours of work. Raises `UserError`."""
        from jobs.runtime.resources import refuse_impossible  # imports Ray, see `run`

        workers = [stage.workers(self.config) for stage in stages if stage.workers and stage.enabled(self.config)]
        refuse_impossible([(count, setting) for count, setting, _ in workers], device)

    def _check_memory(self, stages: Iterable[Stage], device: str) -> None:
        """Check that the workers of the stages that have no result yet fit the devices. Raises `UserError`."""
        from jobs.runtime.device_memory import places  # imports Ray, see `run`
        from ppcl.sizing.fit import check_fits

        waiting = {
            stage.name for stage in stages if stage.enabled(self.config) and self.artifacts.record(stage.name) is None
        }
        found = places(device) if waiting else []
        if found:
            largest = max(place.memory for place in found)
            check_fits(self._size(device, largest), found, waiting)

    def _check_scorers(self) -> None:
        """Try the scorers, unless they have scored this result already. Raises `UserError`."""
        from jobs.stages.scores import NAME, scorer_settings, try_scorers  # imports Ray, see `run`

        record = self.artifacts.record(NAME)
        if record is None or record.info.get("scorers") != scorer_settings(self.config):
            try_scorers(self.config, self.reporter.say)

    def _size(self, device: str, memory: float) -> JobSize:
        import torch

        from ppcl.sizing.device import Device
        from ppcl.sizing.job import job_size
        from ppcl.sizing.model import TeacherSize

        config, cpu = self.config, device == "cpu"
        sampling, calibration = config.sampling, config.calibration
        teacher = TeacherSize.of(
            self.teacher, sampling.height, sampling.width, torch.float32 if cpu else torch.bfloat16
        )
        prompts = count_prompts(config.prompts, calibration.prompt_column, calibration.max_prompts)
        return job_size(config, teacher, prompts, INTERVAL, Device(size=memory), cpu)

    def _wait_for_resources(self, stage: Stage, context: StageContext) -> None:
        """Wait for missing nodes, then for other jobs that use what the stage needs. Raises `UserError`."""
        from jobs.runtime.resources import Resources, shortfall  # imports Ray, see `run`

        if stage.workers is None:
            return
        workers = stage.workers(self.config)
        workers = workers._replace(number=workers.least or workers.number)
        if missing := shortfall(workers.number, context.device, workers.setting):
            self.reporter.say(
                f"{stage.name}: waiting for nodes, {duration(self.config.worker_timeout_s)} from the last new one: "
                f"{missing}"
            )
        resources = Resources.of(workers, context.device, self.config)
        resources.wait(lambda sentence: context.events(0, phase=sentence))
        resources.wait_until_free(context.events)


def _unheard(
    done: int, total: int | None = None, values: Mapping[str, float] | None = None, phase: str | None = None
) -> None:
    """Before a stage runs nobody listens to its progress."""
