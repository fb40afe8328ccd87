import pytest

from tests import made_result


@pytest.fixture(scope="session")
def result_folder(tmp_path_factory, teacher_folder):
    """A result of the tiny teacher with the variants teacher, p90, p75, all and ends."""
    return made_result.result(tmp_path_factory.mktemp("served") / "job", teacher_folder)
