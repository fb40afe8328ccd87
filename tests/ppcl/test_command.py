"""The console command says what to install where the command line's dependencies are missing."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

WITHOUT_RAY = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ray" else find(name, *rest)
from ppcl.command import main
main()
"""


def test_without_the_extra_the_command_names_it_in_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True
    )
    assert ended.returncode == 2
    assert ended.stderr.decode() == (
        "ppcl: the command line needs ray; install ppcl[jobs], or ppcl[all] to serve too\n"
    )
    assert ended.stdout == b""
