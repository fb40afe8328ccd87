"""Weights & Biases: a run of a project, online or as files for `wandb sync`. The key comes from its own environment.

The package is optional and starts a process of its own, so only who uses it imports it.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.tracking.tracker import Outcome, Run, needs
from ppcl.config.schema import WandbTracking
from ppcl.errors import UserError

_CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_CLOUD = "https://api.wandb.ai"
_EXIT_CODES: dict[Outcome, int] = {"finished": 0, "failed": 1, "killed": 130}
# Seconds: for the run to begin, for what is left at its end to be sent.
_INIT, _FINISH = 30.0, 10.0


class WandbTracker:
    """Logs to one run, whose id is that of the job's."""

    def __init__(self, settings: WandbTracking):
        """Raises `UserError` where the package, or the key of an online run, is missing."""
        if find_spec("wandb") is None:
            raise needs("tracking.wandb", "wandb")
        if settings.mode == "online" and not _has_credentials():
            raise UserError(
                "tracking.wandb is online, and there is no key for it; set WANDB_API_KEY, run wandb login, or set "
                "tracking.wandb.mode: offline"
            )
        self.settings = settings
        self.name = f"Weights & Biases ({settings.mode})"

    def start(self, run: Run) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run: Any = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            mode=self.settings.mode,
            id=run.id,
            name=run.name,
            resume="allow",
            config=dict(run.parameters),
            allow_val_change=True,
            dir=run.folder,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                init_timeout=_INIT,
                finish_timeout=_FINISH,
            ),
        )
        self._stages: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], time: float, step: int | None = None) -> None:
        if step is None:
            self._run.summary.update(dict(metrics))
            return
        # Each stage counts its steps from the first: a metric has those of its stage, not the run's.
        values: dict[str, float] = dict(metrics)
        for stage in {name.split("/")[0] for name in metrics}:
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            values[f"{stage}/step"] = step
        self._run.log(values)

    def log_artifact(self, path: Path) -> None:
        self._run.log_artifact(str(path), name=f"{path.stem}-{self._run.id}", type=path.stem)

    def finish(self, outcome: Outcome) -> None:
        import wandb

        self._run.finish(exit_code=_EXIT_CODES[outcome])
        if self.settings.mode == "offline":
            # wandb's process may still have the whole run in its buffers: it has written them when it has ended.
            wandb.teardown()


def _has_credentials() -> bool:
    """Without a key, wandb would ask for one where there is a terminal."""
    if any(os.environ.get(name) for name in _CREDENTIALS):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _CLOUD)).hostname or ""
    try:
        return netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
