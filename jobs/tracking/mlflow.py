"""MLflow: a run on a tracking server, or in a folder. Credentials are those of MLflow's own environment variables.

The package is optional and takes a second to import, so only who uses it does.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.tracking.tracker import Outcome, Run, needs
from ppcl.config.schema import MlflowTracking
from ppcl.errors import UserError

# What one request, and one value, may hold by the limits of MLflow's servers.
_METRICS, _PARAMETERS, _LONGEST_VALUE = 1000, 100, 500
# By this tag a resumed job finds its run.
_RUN_TAG = "ppcl.run"
_DATABASES = ("sqlite", "mysql", "postgresql", "mssql")
_STATUS: dict[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

# By default MLflow would try a request for minutes, tell its makers what is used, and refuse a folder.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}


class MlflowTracker:
    """Logs to one run of an experiment, which it makes where it does not exist."""

    def __init__(self, settings: MlflowTracking):
        """Raises `UserError` where the package or the address of the server is missing."""
        if find_spec("mlflow") is None:
            raise needs("tracking.mlflow", "mlflow-skinny")
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError(
                "tracking.mlflow names no server; set tracking.mlflow.uri to its URL or to a folder, or set "
                "MLFLOW_TRACKING_URI"
            )
        scheme = uri.partition(":")[0].partition("+")[0]
        if scheme in _DATABASES and find_spec("sqlalchemy") is None:
            raise needs(f"tracking.mlflow.uri, a database ({scheme}),", "mlflow", "mlflow")
        self.uri = absolute_uri(uri)
        self.experiment = settings.experiment
        self.name = f"MLflow at {self.uri}"

    def start(self, run: Run) -> None:
        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri)
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {_RUN_TAG: run.id}
            self._run = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        self._log_parameters(run, found[0].data.params if found else {})

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self._client.create_experiment(self.experiment)
            except MlflowException:
                # Another job may have made it since.
                found = self._client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return found.experiment_id

    def _log_parameters(self, run: Run, logged: Mapping[str, str]) -> None:
        """MLflow takes a parameter once: what has changed when a job is resumed becomes a tag of the same name."""
        from mlflow.entities import Param, RunTag

        values = {name: _text(value) for name, value in run.parameters.items()}
        new = [Param(name, value) for name, value in values.items() if name not in logged]
        for params in _batches(new, _PARAMETERS):
            self._client.log_batch(self._run, params=params)
        changed = [RunTag(name, value) for name, value in values.items() if logged.get(name, value) != value]
        for tags in _batches(changed, _PARAMETERS):
            self._client.log_batch(self._run, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float], time: float, step: int | None = None) -> None:
        from mlflow.entities import Metric

        entities = [Metric(name, value, round(1000 * time), step or 0) for name, value in metrics.items()]
        for batch in _batches(entities, _METRICS):
            self._client.log_batch(self._run, metrics=batch)

    def log_artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def finish(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._run, _STATUS[outcome])


def absolute_uri(uri: str) -> str:
    """The URI, or that of a folder given as a path."""
    return uri if ":" in uri or uri == "databricks" else Path(uri).absolute().as_uri()


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
