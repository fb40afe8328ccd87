"""A folder or module of the user's named as one of ours is refused with a sentence, before it is imported."""

import os
import subprocess
import sys

import pytest

from ppcl.errors import UserError
from ppcl.own_packages import check_working_folder
from tests.conftest import REPOSITORY


def test_a_folder_that_workers_would_import_from_is_refused(tmp_path):
    check_working_folder(tmp_path)
    (tmp_path / "jobs").mkdir()
    # Without __init__.py it is data: Python prefers ppcl's own package, wherever it is.
    check_working_folder(tmp_path)
    (tmp_path / "jobs" / "__init__.py").touch()
    with pytest.raises(UserError, match=r"jobs/__init__.py in place of ppcl's own package 'jobs'"):
        check_working_folder(tmp_path)


def test_a_module_file_of_that_name_is_refused_too(tmp_path):
    (tmp_path / "serve.py").touch()
    with pytest.raises(UserError, match=r"serve.py in place of ppcl's own package 'serve'"):
        check_working_folder(tmp_path)


def test_the_checkout_itself_is_no_stranger():
    check_working_folder(REPOSITORY)


@pytest.mark.integration
def test_the_command_says_that_another_package_comes_first(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise RuntimeError('imported')")
    command = [sys.executable, "-c", "from ppcl.command import main; main()", "config"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    ended = subprocess.run(command, cwd=tmp_path / "jobs", env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == (
        f"ppcl: Python finds another module 'jobs' before ppcl's own: {tmp_path}/jobs/__init__.py; "
        "take its folder off PYTHONPATH\n"
    )


@pytest.mark.integration
def test_compress_refuses_to_start_ray_where_its_workers_would_import_the_users_jobs(tmp_path, teacher_folder):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").touch()
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    (tmp_path / "config.yaml").write_text(f"teacher: {teacher_folder}\nprompts: prompts.txt\noutput: result\n")
    # A console script has its own folder first on its path, not the working folder.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "command.py").write_text("from ppcl.command import main\nmain()\n")
    command = [sys.executable, str(tmp_path / "bin" / "command.py"), "compress", "config.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        ended.returncode == 2 and "in place of ppcl's own package 'jobs'; run ppcl from another folder" in ended.stderr
    )
    assert ended.stderr.count("\n") == 1, ended.stderr
