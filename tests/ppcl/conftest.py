"""Teachers of every family with replacements of every kind."""

import pytest

from ppcl.models.teacher import Teacher
from tests.ppcl.export.replacements import MAKERS, replacements


@pytest.fixture(scope="module", params=MAKERS)
def every_kind(request, tmp_path_factory):
    """A family's tiny teacher, and the files of its replacements."""
    teacher = Teacher(MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "teacher"))
    return teacher, replacements(teacher, tmp_path_factory.mktemp("replacements"))
