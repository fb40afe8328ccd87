"""The report in a real browser: it shows what it should with every outside request forbidden, on a phone too."""

import re
import subprocess

import pytest

from ppcl.report import write_report
from tests.ppcl.report import made
from tests.serve.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the report was not looked at in a browser"),
]

EVERY_STAGE = (*made.MEASURED, "finetuning", "ablation")


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


def test_a_page_on_a_phone_does_not_scroll_sideways(tmp_path):
    path = write_report(made.job(tmp_path / "job", EVERY_STAGE, detection=made.measured))
    browser = Browser(tmp_path / "profile", width=390, height=844)
    try:
        browser.resize(390, 844, phone=True)
        browser.open(path.as_uri())
        # A page that is wider than the phone is laid out wider, and shown smaller.
        assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        # What is wider than the page scrolls inside of it, and can be reached.
        outside = """[...document.querySelectorAll('body *')].filter(e => {
            let box = e.getBoundingClientRect();
            for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
                if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
            return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map(e => e.tagName + '.' + e.className)"""
        assert browser.run(outside) == []
        assert browser.problems == []
    finally:
        browser.close()
