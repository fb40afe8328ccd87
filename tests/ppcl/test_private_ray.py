"""Ray that does not come up in time is started again; another failure is not."""

import pytest
import ray

from ppcl.errors import UserError
from ppcl.private_ray import start_embedded_ray

# As Ray says it.
LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.fixture
def failing(monkeypatch):
    """Let `ray.init` fail with one error after the other, then succeed; gives what was asked of it."""

    def fail(*errors):
        calls, left = [], list(errors)

        def init(*given, **settings):
            calls.append((given, settings))
            if left:
                raise left.pop(0)

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
        return calls

    return fail


def test_a_busy_machine_is_given_more_time(failing):
    calls = failing(Exception(LATE), Exception(LATE))
    start_embedded_ray()
    starts = [call for call in calls if call != "shutdown"]
    assert len(starts) == 3 and calls.count("shutdown") == 2
    assert all(given == ("local",) and settings["num_cpus"] >= 4 for given, settings in starts)


def test_a_machine_that_stays_too_busy_is_told(failing):
    calls = failing(*[Exception(LATE)] * 3)
    with pytest.raises(UserError, match="Ray did not start within 30 s, 3 times in a row: this machine is too busy"):
        start_embedded_ray()
    assert calls.count("shutdown") == 3


def test_another_failure_is_not_tried_again(failing):
    calls = failing(RuntimeError("no disk"))
    with pytest.raises(RuntimeError, match="no disk"):
        start_embedded_ray()
    assert len(calls) == 1
