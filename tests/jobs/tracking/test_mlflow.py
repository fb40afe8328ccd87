"""MLflow: a folder, read back by its client, and servers that are away or answer nonsense."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs.tracking import mlflow
from ppcl.config.schema import MlflowTracking
from ppcl.errors import UserError
from tests.heads import free_port


@pytest.fixture
def uri(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def runs(uri):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return client, client.search_runs([client.get_experiment_by_name("ppcl").experiment_id])


def test_a_job_is_one_finished_run_with_its_parameters_metrics_and_report(job, uri, tmp_path):
    job.run({"mlflow": {"uri": str(tmp_path / "store")}}, variants={"budgets": [0.5] * 400})
    client, (run,) = runs(uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "result"
    assert run.data.params["distillation.steps"] == "6000" and not any("tracking" in name for name in run.data.params)
    assert len(run.data.params["variants.budgets"]) == 500  # cut, and not refused
    history = client.get_metric_history(run.info.run_id, "students/loss/1-2")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert run.data.metrics["seconds/students"] == job.artifacts.record("students").seconds
    assert {"sensitivity/1-2", "variants/p90/R", "variants/p90/checker_score"} <= run.data.metrics.keys()
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.parametrize(("end", "status"), [("failed", "FAILED"), ("stopped", "KILLED"), ("nothing", "RUNNING")])
def test_a_job_that_ends_otherwise_says_so_and_a_resumed_one_is_the_same_run(job, uri, end, status):
    job.run({"mlflow": {"uri": uri}}, steps=(1,), end=end)
    _, (first,) = runs(uri)
    assert first.info.status == status
    job.run({"mlflow": {"uri": uri}}, steps=(2,), calibration={"workers": 3})
    client, (second,) = runs(uri)
    assert second.info.run_id == first.info.run_id and second.info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(first.info.run_id, "students/loss/1-2")] == [1, 2]
    # A parameter is logged once: what changed since is a tag.
    assert second.data.params["calibration.workers"] == "1" and second.data.tags["calibration.workers"] == "3"
    assert job.said.count("tracking: ") == 0


def test_a_new_result_is_a_new_run(job, uri):
    job.run({"mlflow": {"uri": uri}})
    job.artifacts.path("tracking.json").unlink()
    job.run({"mlflow": {"uri": uri}})
    assert len(runs(uri)[1]) == 2


def test_a_server_that_is_away_is_told_once_and_the_job_goes_on(job, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    job.run({"mlflow": {"uri": uri}})
    assert job.said.count("tracking: ") == 1 and f"tracking: MLflow at {uri} does not work" in job.said
    assert "evaluation: complete, skipped" in job.said


class _Silent(BaseHTTPRequestHandler):
    """A server that takes requests and never answers."""

    def do_GET(self):
        self.server.over.wait()

    do_POST = do_GET


def test_a_server_that_does_not_answer_does_not_hold_the_job(job, monkeypatch):
    monkeypatch.setattr("jobs.tracking.sender._END", 0.2)
    server = HTTPServer(("127.0.0.1", 0), _Silent)
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        job.run({"mlflow": {"uri": f"http://127.0.0.1:{server.server_port}"}})
        assert "has not taken the last of the job" in job.said and "students: done" in job.said
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def test_what_is_missing_is_told_before_the_job(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="tracking.mlflow names no server; set tracking.mlflow.uri"):
        mlflow.MlflowTracker(MlflowTracking())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-the-environment")
    assert mlflow.MlflowTracker(MlflowTracking()).uri == "http://from-the-environment"
    monkeypatch.setattr(mlflow, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    with pytest.raises(UserError, match="a database .sqlite., needs the package mlflow, which is not installed"):
        mlflow.MlflowTracker(MlflowTracking(uri="sqlite:///runs.db"))
    monkeypatch.setattr(mlflow, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracking.mlflow needs the package mlflow-skinny, which is not installed; pip"):
        mlflow.MlflowTracker(MlflowTracking(uri="http://server"))
