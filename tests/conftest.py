"""Fixtures shared by all tests: one Ray for the whole session, one tiny teacher."""

import os
import signal
from pathlib import Path

import pytest

# Or a failed assertion in it would not show its values.
pytest.register_assert_rewrite("tests.listening")

REPOSITORY = Path(__file__).resolve().parent.parent

# Read when Ray is imported, and inherited by its workers, which import this repository from wherever they run.
os.environ |= {
    # Wide enough for the tables that commands print.
    "COLUMNS": "200",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Ray's workers get their share of a machine that is busy with other tests, too.
    "RAY_worker_niceness": "0",
}

# In the background of a shell Ctrl-C is ignored, and would be by the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with 4 logical CPUs, which may be more than the machine has."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 1024**2, log_to_driver=False)
    yield ray
    ray.shutdown()


# Fixtures behind which are processes, sockets or a browser; whatever uses one is no unit test.
_INTEGRATION_FIXTURES = {"ray_cluster", "s3_server", "server", "client", "browser", "start"}
_INTEGRATION_FOLDERS = ("tests/jobs/", "tests/serve/test_", "tests/packaging/", "tests/docs/")


# The files that take longest, the longest first.
_LONGEST = (
    "tests/jobs/test_whole_job.py",
    "tests/jobs/test_submission.py",
    "tests/serve/test_local_server.py",
    "tests/serve/test_ray_app.py",
    "tests/jobs/test_submission_token.py",
    "tests/jobs/stages/test_probes.py",
    "tests/jobs/stages/test_calibration.py",
)


def pytest_collection_modifyitems(items):
    """Mark the integration tests, so that the unit tests can be run alone, and run them first, the longest files ahead.

    Files go whole to the processes of pytest-xdist, in this order: one that takes long must not be the last.
    """
    for item in items:
        path = item.path.relative_to(REPOSITORY).as_posix()
        uses_one = _INTEGRATION_FIXTURES & set(item.fixturenames) or item.get_closest_marker("browser")
        if path.startswith(_INTEGRATION_FOLDERS) or uses_one:
            item.add_marker(pytest.mark.integration)
    integration = {item.path for item in items if item.get_closest_marker("integration")}
    longest = {REPOSITORY / path: place for place, path in enumerate(_LONGEST)}
    items.sort(key=lambda item: (longest.get(item.path, len(longest)), item.path not in integration))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A stock QwenImagePipeline folder with random weights; its pictures are 32 × 32."""
    from tests import tiny

    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server over HTTP, with one bucket; see `tests.bucket`."""
    from tests import bucket

    with bucket.served() as proxy:
        yield proxy


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """That server in the environment, with a URL in its bucket and a scratch folder that no other test uses."""
    from tests import bucket

    for name, value in {**bucket.CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.url, "AWS_MAX_ATTEMPTS": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("ppcl.storage.object_store._FIRST_PAUSE", 0.05)
    s3_server.requests.clear()
    s3_server.bucket = f"s3://{bucket.BUCKET}/{tmp_path.name}"
    return s3_server


@pytest.fixture
def store(s3):
    """The objects under that URL."""
    from ppcl.storage import object_store

    object_store._files.cache_clear()
    return object_store.Store(s3.bucket)
