import pytest

from ppcl.models.teacher import Teacher


@pytest.fixture(scope="module")
def qwen(teacher_folder):
    return Teacher(teacher_folder).pipeline()
