"""What the log says of a failure: the cause's class, its sentence and its place, through all of Ray's wrapping."""

import re

import pytest
import ray
import ray.data
from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.train.v2._internal.util import construct_user_exception_with_traceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs.failures import WorkerLost, describe_failure
from ppcl.replacements import parse_replacement


def look_up(key):
    return {}[key]


def chained(key):
    try:
        return look_up(key)
    except KeyError as error:
        raise RuntimeError("no plan could be made") from error


def raised(call, *arguments):
    with pytest.raises(Exception) as caught:
        call(*arguments)
    return caught.value


class Mapper:
    def __call__(self, batch):
        return look_up(int(batch["number"][0]))


def test_an_error_of_this_process_is_named_by_its_class():
    assert re.fullmatch(
        r"KeyError: 7 \(.*tests/jobs/test_failures\.py, line \d+\)", describe_failure(raised(look_up, 7))
    )


def test_the_place_is_the_innermost_in_this_programs_own_code():
    error = raised(parse_replacement, 7)
    assert re.search(r" \(ppcl/replacements/registry\.py, line \d+\)$", describe_failure(error))


def test_an_error_that_was_raised_from_another_is_told_by_its_cause():
    assert describe_failure(raised(chained, 7)).startswith("KeyError: 7 (")


def test_an_error_of_a_task_is_its_own_and_not_rays(ray_cluster):
    error = raised(ray.get, ray.remote(look_up).remote(7))
    assert isinstance(error, RayTaskError)
    assert re.fullmatch(r"KeyError: 7 \(.*tests/jobs/test_failures\.py, line \d+\)", describe_failure(error))


def test_the_cause_of_a_tasks_error_is_told_although_pickling_loses_it(ray_cluster):
    error = raised(ray.get, ray.remote(chained).remote(7))
    assert describe_failure(error).startswith("KeyError: 7 (")


def test_ray_datas_advice_does_not_hide_the_cause(ray_cluster):
    numbers = ray.data.from_items([{"number": 7}])
    pool = ray.data.ActorPoolStrategy(size=1)
    error = raised(lambda: list(numbers.map_batches(Mapper, compute=pool, batch_size=1).iter_rows()))
    assert "To change retry attempts" in str(error)
    assert re.fullmatch(r"KeyError: 7 \(.*tests/jobs/test_failures\.py, line \d+\)", describe_failure(error))


def test_an_error_of_a_rank_is_told_for_the_first_rank_that_failed():
    failures = {rank: construct_user_exception_with_traceback(raised(look_up, rank)) for rank in (3, 1)}
    line = describe_failure(WorkerGroupError("advice", failures))
    assert re.fullmatch(r"KeyError: 1 \(.*tests/jobs/test_failures\.py, line \d+\)", line)
    assert describe_failure(ControllerError(failures[3])) == line.replace("KeyError: 1", "KeyError: 3")


def test_an_error_without_a_traceback_or_a_message_is_told_by_its_class():
    assert describe_failure(ValueError()) == "ValueError"
    assert describe_failure(WorkerCrashedError()).startswith("WorkerCrashedError: The worker died unexpectedly")


def test_a_lost_worker_is_told_in_its_own_words():
    try:
        raise WorkerLost("rank 0 sent no heartbeat") from raised(look_up, 7)
    except WorkerLost as error:
        assert describe_failure(error) == "rank 0 sent no heartbeat"


def test_a_long_message_is_cut_and_of_several_lines_the_first_is_taken():
    assert len(describe_failure(ValueError("x" * 5000))) < 400
    assert describe_failure(ValueError("\nshapes differ\n  (3, 4)")) == "ValueError: shapes differ"


def test_a_package_of_the_users_on_the_workers_path_is_named():
    error = RuntimeError("The actor died: ModuleNotFoundError: No module named 'jobs.stages'")
    assert describe_failure(error).startswith("the workers find another module 'jobs' before ppcl's own; take")
