"""One engine of the tiny result for all tests of the API, and servers over it."""

import json

import pytest

from serve.config import Http, Limits, Settings
from tests import made_result
from tests.serve.served import Server

# Wide enough for requests that are still under way when they are cancelled.
LIMITS = Limits(steps=2000, pixels=256 * 256, body_bytes=64 * 1024)


@pytest.fixture(autouse=True, scope="session")
def no_keys_in_the_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PPCL_API_KEYS", raising=False)
        yield


@pytest.fixture(scope="session")
def result_folder(tmp_path_factory, teacher_folder):
    """A result of the tiny teacher with the variants teacher, p90, p75, all and ends. No test may change it."""
    return made_result.result(tmp_path_factory.mktemp("served") / "result", teacher_folder)


@pytest.fixture(scope="session")
def served(result_folder):
    """What the engine is to load."""
    from serve.config import Served

    # Patient, so that `auto` generates with the teacher however busy the machine is.
    return Served(
        result=result_folder, limits=LIMITS, engine={"queue": 16, "device": "cpu"}, elastic={"patience": 10_000}
    )


@pytest.fixture(scope="session")
def engine(served):
    from serve.engine.engine import Engine

    made = Engine(served)
    yield made
    made.close()


@pytest.fixture(scope="session")
def server(engine, no_keys_in_the_environment):
    """Without keys."""
    served = Server(engine, Settings(http=Http(ping_seconds=0.05, body_seconds=3), limits=LIMITS))
    yield served
    served.close()


@pytest.fixture(scope="session")
def locked_server(engine, tmp_path_factory):
    """With the keys `sesame` and `open-up`."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("sesame\nopen-up\n")
    served = Server(engine, Settings(http=Http(api_keys_file=file), limits=LIMITS))
    yield served
    served.close()


@pytest.fixture
def lines(tmp_path):
    """The log's lines so far, parsed, while a test runs."""
    from serve.logging import log, log_as_json

    file, before = tmp_path / "log.jsonl", (list(log.handlers), log.level, log.propagate)
    log_as_json(file)
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])
