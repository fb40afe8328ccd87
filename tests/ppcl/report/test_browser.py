"""The report in a real browser: it shows what it should with every outside request forbidden."""

import re
import shutil
import subprocess

import pytest

from ppcl.report import write_report
from tests.ppcl.report import made

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the report was not looked at in a browser")
def test_a_browser_renders_the_report_and_asks_for_nothing_outside(tmp_path):
    path = write_report(made.job(tmp_path / "job"))
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    run = subprocess.run(
        [CHROMIUM, *arguments, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = run.stdout
    for said in (
        "shapes-qwen",
        "Quality against size",
        "Checker score by category",
        "a photo of",
        "Sensitivity: the velocity error",
    ):
        assert said in dom
    assert dom.count("<img ") == 40 and dom.count("<svg ") > 18
    assert not re.search(r"https?://", dom)
    assert not re.search(r"CONSOLE.*(Refused|violates|Failed)", run.stderr), run.stderr
