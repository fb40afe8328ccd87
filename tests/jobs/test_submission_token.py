"""A real cluster that asks for a token, and who comes without it or with another."""

import pytest
import yaml

from tests.commands import as_process as ppcl
from tests.heads import started

pytestmark = pytest.mark.dashboard

TOKEN = "a" * 64


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with started(tmp_path_factory.mktemp("away"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        yield head


@pytest.mark.parametrize(
    "given", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}], ids=["nothing", "a wrong one"]
)
def test_none_or_a_wrong_token_is_told(guarded, given, monkeypatch, tmp_path, teacher_folder):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green cross\n")
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "teacher": str(teacher_folder),
                "prompts": "prompts.txt",
                "output": str(tmp_path / "result"),
                "device": "cpu",
            }
        )
    )
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray looks for a token there, too
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for command, address in ((["list"], guarded.api), (["compress", job], guarded.gcs)):
        code, _, wrong = ppcl(*command, "--address", address)
        assert code == 2 and wrong.startswith(
            f"ppcl: the cluster at {address} needs a token; none or a wrong one was given"
        ), (command, wrong)
        assert wrong.count("\n") == 1


def test_a_token_that_is_wanted_and_nowhere_is_told_before_anything_is_asked(monkeypatch, tmp_path, teacher_folder):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green cross\n")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump({"teacher": str(teacher_folder), "prompts": "prompts.txt", "output": str(tmp_path / "result")})
    )
    code, _, wrong = ppcl("compress", job, "--address", "auto")
    assert (
        code == 2
        and wrong.startswith("ppcl: the cluster at auto needs a token; none or a wrong one was given")
        and wrong.count("\n") == 1
    )


def test_who_has_the_token_gets_in(guarded, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    code, said, wrong = ppcl("list", "--address", guarded.api)
    assert code == 0 and said.startswith("no ppcl jobs"), wrong
