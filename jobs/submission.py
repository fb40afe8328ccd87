"""Jobs on a cluster somewhere else, by Ray's job API: sent, looked at, followed, stopped.

The packages travel with the job unless the cluster has them. A job's state is what its log says, in the lines of
`jobs.events`, so nothing but the job API has to be reachable.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jobs.dependencies import pinned_dependencies
from jobs.events import PRINT_EVENTS, EventFilter, JobProgress, printed_events, progress_after, without_events
from jobs.runtime.cluster import needs_token
from jobs.tracking.mlflow import absolute_uri
from ppcl.config.schema import Config
from ppcl.errors import UserError

Env = Literal["pip", "uv"]
_PACKAGES = ("ppcl", "jobs")
_ANSWER_SECONDS = 10
# A head that has just started answers so until its agents are there, which takes some seconds.
_NO_AGENT = "No available agent"
_START_SECONDS = 60.0
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_OLDEST_PYTHON = (3, 11)
# What a job imports and does not bring with it, beside Ray.
_NEEDED = (
    "PIL",
    "accelerate",
    "diffusers",
    "fsspec",
    "jinja2",
    "matplotlib",
    "numpy",
    "peft",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "s3fs",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "yaml",
)
# How long a job may take to begin before it is called waiting, and to end after it was told to, seconds.
_BEGIN_SECONDS, _STOP_SECONDS = 180, 120
# How often in a row, a second apart, a log is asked for in vain before following it is given up: a head may restart
# meanwhile.
_RECONNECTS = 120

# How long a node may take to install what a job brings with it, seconds: torch for GPUs is some gigabytes.
_INSTALL_SECONDS = 3600

# What Ray says where it could not make a job's environment, and the drawing in an error of uv.
_NO_ENVIRONMENT = "runtime_env setup failed"
_UV_ERROR = ("×", "error:")
_WITHOUT_DRAWING = {ord(character): " " for character in "×╰─▶│├"}
_LONGEST_REASON = 300

# What a command that failed says begins so.
_ERROR = "ppcl: "

# What Ray's client goes to if the environment has it, whatever address it is given.
_OTHER_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class _Refused(UserError):
    """The cluster answered, but not with what it was asked for."""


@dataclass(frozen=True)
class Status:
    """A job: `state` as Ray calls it, `progress`: its progress, `output`: the location of its result."""

    id: str
    state: str
    output: str
    progress: JobProgress
    begun: datetime | None
    ended: datetime | None

    def to_json(self) -> dict[str, Any]:
        times = {"begun": self.begun and self.begun.isoformat(), "ended": self.ended and self.ended.isoformat()}
        return {"id": self.id, "state": self.state, "output": self.output, **vars(self.progress), **times}


class Jobs:
    """The jobs of a cluster.

    Raises `UserError` where nothing answers at the address, or something else than a Ray of our version.
    """

    def __init__(self, address: str):
        import ray
        import requests
        from ray.job_submission import JobSubmissionClient

        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"--address {address!r} is not an address of Ray's job API; give http://HEAD:8265, the head's dashboard"
            )
        self.address = address.rstrip("/")
        try:
            answer = requests.get(f"{self.address}/api/version", timeout=_ANSWER_SECONDS)
            version = answer.json().get("ray_version") if answer.ok else None
        except requests.exceptions.ConnectionError:
            raise UserError(
                f"nothing answers at {self.address}; check the address and that the head's dashboard runs"
            ) from None
        except (requests.exceptions.RequestException, ValueError, AttributeError):
            version, answer = None, None
        if answer is not None and answer.status_code in (401, 403):
            # The client sends the token where there is one, and tells how to give it.
            version = ray.__version__
        if version is None:
            raise UserError(
                f"what answers at {self.address} is not Ray's job API; give http://HEAD:8265, the head's dashboard"
            )
        if version.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise UserError(
                f"the cluster at {self.address} runs Ray {version}, this ppcl Ray {ray.__version__}; use the same on "
                "both sides"
            )
        with self._asking(), _without(*_OTHER_ADDRESSES):
            self.client = JobSubmissionClient(self.address)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What goes wrong in a request, in one sentence."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise needs_token(self.address) from None
        except (RuntimeError, aiohttp.WSServerHandshakeError) as error:
            # Ray's client raises it for every answer but 200, with the head's traceback and a full stop, and where a
            # log's connection broke.
            reason = _last_line(str(error).rstrip(". \n"))
            raise _Refused(f"the cluster at {self.address} could not answer ({reason})") from None
        except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
            raise UserError(
                f"the cluster at {self.address} does not answer any more ({type(error).__name__})"
            ) from None

    def submit(self, config: Config, installed: bool = False, env: Env | None = None) -> str:
        """Send a job; gives its id. `installed`: the cluster has ppcl itself. `env`: what installs its dependencies.

        Raises `UserError` where a job on the same output is under way already, or a dependency cannot be sent.
        """
        environment = _environment(config, env)

        def taken(by: str) -> UserError:
            return UserError(f"the job {by} works on {output} already; `ppcl logs {by} -f` follows it")

        output = str(config.output)
        name = f"ppcl-{hashlib.sha256(output.encode()).hexdigest()[:8]}"
        before = [job for job in self._details() if job.submission_id.startswith(f"{name}-")]
        for job in before:
            if str(job.status.value) not in _ENDED:
                raise taken(job.submission_id)
        numbers = [int(job.submission_id.rpartition("-")[2]) for job in before]
        identity = f"{name}-{max(numbers, default=0) + 1}"
        check = shlex.join(["python", "-c", _check(() if installed else _NEEDED)])
        command = "ppcl" if installed else "python -m jobs.cli.main"
        with tempfile.TemporaryDirectory() as folder, self._asking():
            # JSON is YAML.
            Path(folder, "config.yaml").write_text(config.model_dump_json(indent=1))
            for package in () if installed else _PACKAGES:
                source = Path(__file__).resolve().parent.parent / package
                shutil.copytree(source, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
            try:
                self._send(
                    entrypoint=f"{check} && {command} compress config.yaml --address auto",
                    submission_id=identity,
                    metadata={"ppcl": "compress", "output": output, "teacher": str(config.teacher)},
                    runtime_env={"working_dir": folder, **environment},
                )
            except RuntimeError as error:
                # Somebody else sent it since our look at the jobs; Ray takes an id once.
                if "already exists" not in str(error):
                    raise
                raise taken(identity) from None
        return identity

    def _send(self, **job: Any) -> None:
        """Submit a job; waits for a head that has just started, whose agents are not there yet."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.client.submit_job(**job)
                return
            except RuntimeError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def wait_until_begun(self, identity: str) -> Status:
        """Wait until a job has begun a stage, or ended.

        Raises `UserError` with its own words where it refused its input.
        """
        deadline = time.monotonic() + _BEGIN_SECONDS
        while True:
            status = self.status(identity)
            if status.state == "FAILED":
                raise UserError(f"the job {identity} failed: {status.progress.error}")
            if status.progress.stage or status.state in _ENDED or time.monotonic() > deadline:
                return status
            time.sleep(0.5)

    def _details(self) -> list[Any]:
        """Our jobs, the oldest first."""
        with self._asking():
            found = [job for job in self.client.list_jobs() if job.submission_id and (job.metadata or {}).get("ppcl")]
        return sorted(found, key=lambda job: job.start_time or 0)

    def _find(self, identity: str | None) -> Any:
        """A job by its id; without one the last that was sent."""
        jobs = self._details()
        for job in reversed(jobs):
            if identity in (None, job.submission_id):
                return job
        known = ", ".join(job.submission_id for job in jobs[-10:])
        if identity is None:
            raise UserError(f"the cluster at {self.address} has no ppcl job; send one with ppcl submit")
        raise UserError(f"there is no job {identity!r} at {self.address}; there are {known or 'none'}")

    def status(self, identity: str | None = None) -> Status:
        return self._status(self._find(identity))

    def _status(self, job: Any) -> Status:
        unread = None
        try:
            progress = _progress(self._log(job.submission_id))
        except _Refused as error:
            # The node it was on may be gone, and the job is one all the same.
            progress, unread = JobProgress(), f"its log cannot be read: {error}"
        if str(job.status.value) == "FAILED" and not progress.error:
            progress = replace(progress, error=_last_words(job.message))
        elif unread:
            progress = replace(progress, error=unread)
        begun, ended = (t and datetime.fromtimestamp(t / 1000, UTC) for t in (job.start_time, job.end_time))
        return Status(job.submission_id, str(job.status.value), job.metadata["output"], progress, begun, ended)

    def all(self) -> list[Status]:
        return [self._status(job) for job in self._details()]

    def identity(self, identity: str | None = None) -> str:
        """The id of a job; without one that of the last that was sent. Raises `UserError` where there is none."""
        return self._find(identity).submission_id

    def logs(self, identity: str | None = None) -> str:
        """The log of a job, without its events."""
        return without_events(self._log(self.identity(identity)))

    def _log(self, identity: str) -> str:
        with self._asking():
            return self.client.get_job_logs(identity)

    def follow(self, identity: str, say: Callable[[str], None]) -> Status:
        """Say a job's log as it grows, until the job ends, over connections that break.

        Raises `UserError` where the cluster or the log stays out of reach.
        """
        said, in_vain = 0, 0
        readable = EventFilter()

        async def tail() -> None:
            nonlocal said, in_vain
            # Every connection begins with the log's first line.
            known = said
            async for text in self.client.tail_job_logs(identity):
                in_vain = 0
                new, known = text[known:], max(known - len(text), 0)
                said += len(new)
                if text_for_people := readable(new):
                    say(text_for_people)

        while True:
            in_vain += 1
            wrong: UserError | None = None
            try:
                with self._asking():
                    asyncio.run(tail())
                # Closed in good order, which says nothing of the job.
                in_vain = 0
            except UserError as error:
                wrong = error
            try:
                status = self.status(identity)
                if status.state in _ENDED:
                    break
            except UserError as error:
                wrong = error
            if wrong and in_vain >= _RECONNECTS:
                raise UserError(
                    f"the job {identity} cannot be followed: {wrong}; it may still run: `ppcl logs {identity} -f` "
                    "follows it again"
                )
            time.sleep(1)
        try:
            say(readable(self._log(identity)[said:]) + readable.rest())
        except _Refused as error:
            say(f"the rest of its log cannot be read: {error}\n")
        return status

    def stop(self, identity: str | None = None) -> Status:
        """Stop a job and wait until it has ended. Raises `UserError` for one that has ended already."""
        job = self._find(identity)
        if str(job.status.value) in _ENDED:
            raise UserError(f"the job {job.submission_id} has ended already ({job.status.value}); nothing to stop")
        with self._asking():
            self.client.stop_job(job.submission_id)
        deadline = time.monotonic() + _STOP_SECONDS
        while (status := self.status(job.submission_id)).state not in _ENDED and time.monotonic() < deadline:
            time.sleep(0.5)
        return status


def _environment(config: Config, env: Env | None) -> dict[str, Any]:
    """What the job runs in on the nodes, beside its folder. Raises `UserError` where a dependency cannot be sent."""
    environment: dict[str, Any] = {
        # A stopped job ends as by Ctrl-C: it gives its output free.
        "env_vars": {
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "COLUMNS": "120",
            PRINT_EVENTS: "1",
        }
    }
    if env is not None:
        environment[env] = {"packages": pinned_dependencies(config)}
        environment["config"] = {"setup_timeout_seconds": _INSTALL_SECONDS}
    return environment


def _check(needed: tuple[str, ...]) -> str:
    """Python for the cluster, of whatever age: ends with a sentence where a job could not run there."""
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    return (
        "import sys; "
        f"sys.version_info >= {_OLDEST_PYTHON} or sys.exit('ppcl: the cluster runs a Python older than {oldest}'); "
        f"from importlib.util import find_spec; gone = [name for name in {needed} if not find_spec(name)]; "
        "gone and sys.exit('ppcl: the cluster has no ' + ', '.join(gone) + '; "
        "install the dependencies of ppcl on its nodes, send them with --env pip, or give the nodes the image of "
        "cluster/Dockerfile')"
    )


def _progress(log: str) -> JobProgress:
    """How far a job is, by its driver's log. A driver that ended before its first event says its error all the same."""
    progress = progress_after(printed_events(log))
    errors = [line.removeprefix(_ERROR) for line in log.splitlines() if line.startswith(_ERROR)]
    return replace(progress, error=errors[-1]) if errors else progress


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _installer_error(message: str) -> str:
    """What pip or uv had against the packages, in one line, out of Ray's traceback with the installer's output."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    of_pip = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    # uv draws its one error, over several lines.
    of_uv = next((" ".join(lines[number:]) for number, line in enumerate(lines) if line.startswith(_UV_ERROR)), "")
    words = of_pip[-1] if of_pip else of_uv or lines[-1]
    return " ".join(words.translate(_WITHOUT_DRAWING).split())[:_LONGEST_REASON]


def _last_words(message: str | None) -> str:
    """Why a job failed that did not say so itself, by what Ray says of it and the end of the log in there."""
    if message and message.startswith(_NO_ENVIRONMENT):
        return (
            f"the nodes could not install what it needs ({_installer_error(message)}); they need an index that has it "
            "(PIP_INDEX_URL or UV_INDEX_URL in their environment), or the image of cluster/Dockerfile and no --env"
        )
    words, _, log = (message or "it left no word").partition(", last available logs")
    words = " ".join(words.split())
    # Ray's own line about the command may come late, behind what a short command said.
    lines = [
        line for line in log.splitlines()[1:] if line.strip() and not line.startswith("Running entrypoint for job ")
    ]
    if error := _progress("\n".join(lines)).error:
        return error
    if lines and not printed_events(lines[-1]):
        words = f"{words}: {lines[-1].strip()}"
    return f"{words}; submitting the same configuration again continues it"


def absolute(config: Config) -> Config:
    """The configuration with paths that mean the same on every node that shares them."""
    values = config.model_dump(mode="json")
    for section, key in (
        (values, "teacher"),
        (values, "prompts"),
        (values, "output"),
        (values["evaluation"], "prompts"),
        (values["tracking"], "tensorboard"),
    ):
        if section[key] is not None and "://" not in section[key]:
            section[key] = str(Path(section[key]).absolute())
    mlflow = values["tracking"]["mlflow"]
    if mlflow is not None and mlflow["uri"] is not None:
        mlflow["uri"] = absolute_uri(mlflow["uri"])
    return Config.model_validate(values)
