"""The table of sizes, and the page that holds it."""

import re

from jobs.cli.plan import default_config
from ppcl.config.plan_defaults import BATCH, GPUS, INTERVAL, PROMPTS
from ppcl.sizing import FORMULAS, Device, layouts
from ppcl.sizing.fit import laid_out
from ppcl.sizing.job import job_size
from ppcl.sizing.memory import intervals
from ppcl.sizing.model import TeacherSize
from ppcl.sizing.stages import worker_sizes
from ppcl.sizing.table import duration, gigabytes, job_rows, rows_of
from tests.conftest import REPOSITORY


def test_the_sizing_page_holds_what_the_code_computes(models):
    page = (REPOSITORY / "cluster" / "README.md").read_text()
    found = [re.sub(r" *\| *", "|", line.strip()) for line in page.splitlines()]
    for model in models:
        for row in rows_of(list(layouts(model, intervals(model, INTERVAL), BATCH, GPUS))):
            assert "|" + "|".join(row) + "|" in found, (model.name, row)
    assert FORMULAS in page
    teacher = TeacherSize.named("qwen-image", 1024, 1024)
    job = job_size(
        laid_out(default_config([], (1024, 1024)), teacher, 8, INTERVAL), teacher, PROMPTS, INTERVAL, Device()
    )
    for row in job_rows(worker_sizes(job)):
        assert "|" + "|".join(row) + "|" in found, row


def test_the_pages_say_the_defaults_that_the_command_has():
    page = " ".join((REPOSITORY / "cluster" / "README.md").read_text().split())
    words = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}[INTERVAL]
    assert f"one student for {words} blocks, {BATCH} samples per step" in page
    assert f"a student for every {words} blocks" in page and f"{PROMPTS:,} prompts" in page
    assert f"One student for {words} blocks gives at most {len(range(0, 60, INTERVAL))} segments" in page
    options = (REPOSITORY / "docs" / "commands.md").read_text()
    assert f"| `--interval` | `{INTERVAL}` |" in options and ",".join(map(str, GPUS)) in options


def test_bytes_are_told_in_three_digits():
    assert [gigabytes(n) for n in (0, 999, 28.31e6, 999.9e6, 40.9e9, 151e9, 19.02e12)] == [
        "–",
        "999 B",
        "28.3 MB",
        "1000 MB",
        "40.9 GB",
        "151 GB",
        "19 TB",
    ]


def test_durations_are_told_in_the_unit_that_people_would_use():
    assert [duration(s) for s in (None, 4, 89.6, 600, 5400, 57010)] == ["–", "4 s", "90 s", "10 min", "1.5 h", "15.8 h"]
