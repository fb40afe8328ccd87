"""The demo's prompts: made by the script that the file names, and none of them held out."""

from pathlib import Path

from ppcl.demo.prompts import OTHERS, others, prompts
from ppcl.demo.world import captions

FILE = Path(__file__).resolve().parents[3] / "demo" / "prompts.txt"


def test_the_file_is_what_the_script_prints():
    assert FILE.read_text().splitlines() == prompts()


def test_no_prompt_is_held_out_and_none_comes_twice():
    made = prompts()
    assert len(set(made)) == len(made) == OTHERS + sum(not c.held_out for c in captions())
    assert not set(made) & {c.text for c in captions() if c.held_out}
    assert set(made) - {c.text for c in captions()} <= set(others())
