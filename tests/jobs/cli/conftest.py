"""The command line in this process."""

import sys

import pytest

from jobs.cli import main as cli


@pytest.fixture
def ppcl(monkeypatch, capsys):
    """Run a command in this process; gives its exit code and what it said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
