"""Suites of prompts, as benchmarks publish them."""

import json

import pytest

from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.evaluation.prompt_checker import TestPrompt
from ppcl.evaluation.suites import configured_prompts, read_suite


def suite(tmp_path, *rows, name="suite.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_all_columns_go_along(tmp_path):
    path = suite(
        tmp_path, {"prompt": " a cat ", "tag": "one", "include": [{"class": "cat"}]}, {"prompt": "b", "tag": "two"}
    )
    assert read_suite(path, "geneval") == [
        TestPrompt(
            "a cat", "one", "geneval", {"prompt": " a cat ", "tag": "one", "include": [{"class": "cat"}], "id": "0"}
        ),
        TestPrompt("b", "two", "geneval", {"prompt": "b", "tag": "two", "id": "1"}),
    ]


def test_ids_are_taken_as_text_and_the_first_lines_up_to_a_limit(tmp_path):
    path = suite(tmp_path, {"prompt": "a", "id": 7}, "", {"prompt": "b", "prompt_id": "x"}, {"prompt": "c"})
    assert [prompt.row["id"] for prompt in read_suite(path, "s", limit=2)] == ["7", "x"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1 has no text under 'prompt'"),
        ([{"prompt": "a"}, {"prompt": " "}], "line 2 has no text under 'prompt'"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "line 2 has the id '1' of another line"),
        (["{"], "line 1 is not valid JSON"),
        (["[" * 100_000], "line 1 has brackets in thousands of levels; remove"),
        (['{"prompt": ' + "1" * 5_000 + "}"], "line 1 has a number of thousands of digits; shorten"),
        ([r'{"prompt": "cat \ud83d"}'], r"line 1: the text has half a character \(\\ud83d\); write it whole"),
        (["[1]"], "line 1 is not a JSON object"),
        ([], "holds no prompts"),
        ([{"prompt": "a", "category": "x"}, {"prompt": "b"}], "lines with a category and lines without"),
    ],
)
def test_a_suite_that_cannot_be_read_is_refused_with_its_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_suite(suite(tmp_path, *rows), "mine")


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the suite 'mine': the file .*gone.jsonl does not exist"):
        read_suite(tmp_path / "gone.jsonl", "mine")


def test_the_configurations_prompts_come_before_its_suites(tmp_path):
    own = suite(tmp_path, {"prompt": "a", "category": "x"}, {"prompt": "b", "category": "y"}, name="own.jsonl")
    other = suite(tmp_path, {"prompt": "c"}, {"prompt": "d"})
    settings = {"prompts": own, "suites": {"dpg": other}, "max_prompts": 1}
    config = Config(teacher="teacher", prompts="prompts.txt", evaluation=settings)
    found = configured_prompts(config)
    assert [(p.text, p.category, p.suite) for p in found] == [("a", "x", "prompts"), ("c", None, "dpg")]
