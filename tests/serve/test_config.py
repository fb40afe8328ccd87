"""Settings of a server: defaults, a file, the command line."""

import re
from pathlib import Path

import pytest

from ppcl.errors import UserError
from serve.config import Served, commented_defaults, load_settings


def test_the_printed_defaults_are_settings_that_load(tmp_path):
    (tmp_path / "printed.yaml").write_text(commented_defaults())
    assert load_settings(Path("r"), tmp_path / "printed.yaml") == Served(result="r")


def test_settings_come_from_defaults_then_the_file_then_the_command(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("engine:\n  batch: 2\n  queue: 3\nhttp:\n  port: 9000\n")
    settings = load_settings(Path("r"), path, ["engine.queue=5"], {"host": None, "port": 9001})
    assert (settings.engine.batch, settings.engine.queue, settings.http.port, settings.http.host) == (
        2,
        5,
        9001,
        "127.0.0.1",
    )


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("engine: {batch: 0}", [], "engine.batch is 0: input should be greater than or equal to 1"),
        ("engin: {}", [], "unknown key engin; the nearest is engine"),
        ("[1]", [], "is not a mapping of keys to values; `ppcl config --serve` prints one"),
        ("{}", ["engine.batch"], "is not of the form key=value, such as engine.batch=4"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence(tmp_path, text, overrides, sentence):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_settings(Path("r"), path, overrides)


def test_a_host_is_taken_as_text():
    assert load_settings(Path("r"), None, None, {"host": "::", "port": None}).http.host == "::"
