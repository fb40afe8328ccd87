"""The table of sizes, and the page that holds it."""

import re

from jobs.cli.plan import PROMPTS, default_config
from ppcl.sizing import FORMULAS, Device, layouts
from ppcl.sizing.fit import laid_out
from ppcl.sizing.job import job_size
from ppcl.sizing.memory import intervals
from ppcl.sizing.model import TeacherSize
from ppcl.sizing.stages import worker_sizes
from ppcl.sizing.table import duration, gigabytes, job_rows, rows_of
from tests.conftest import REPOSITORY

GPUS = (1, 2, 4, 8, 16, 32, 64)


def test_the_sizing_page_holds_what_the_code_computes(models):
    page = (REPOSITORY / "cluster" / "README.md").read_text()
    found = [re.sub(r" *\| *", "|", line.strip()) for line in page.splitlines()]
    for model in models:
        for row in rows_of(list(layouts(model, intervals(model, 4), 16, GPUS))):
            assert "|" + "|".join(row) + "|" in found, (model.name, row)
    assert FORMULAS in page
    teacher = TeacherSize.named("qwen-image", 1024, 1024)
    job = job_size(laid_out(default_config([], (1024, 1024)), teacher, 8, 4), teacher, PROMPTS, 4, Device())
    for row in job_rows(worker_sizes(job)):
        assert "|" + "|".join(row) + "|" in found, row


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
