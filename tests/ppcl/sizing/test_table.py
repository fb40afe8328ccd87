"""The table of sizes, and the page that holds it."""

import re

from ppcl.sizing import FORMULAS, layouts
from ppcl.sizing.memory import intervals
from ppcl.sizing.table import gigabytes, rows_of
from tests.conftest import REPOSITORY

GPUS = (1, 2, 4, 8, 16, 32, 64)


def test_the_sizing_page_holds_what_the_code_computes(models):
    page = (REPOSITORY / "cluster" / "README.md").read_text()
    found = [re.sub(r" *\| *", "|", line.strip()) for line in page.splitlines()]
    for model in models:
        for row in rows_of(list(layouts(model, intervals(model, 4), 16, GPUS))):
            assert "|" + "|".join(row) + "|" in found, (model.name, row)
    assert FORMULAS in page


def test_bytes_are_told_in_three_digits():
    assert [gigabytes(n) for n in (0, 999, 28.31e6, 999.9e6, 40.9e9, 151e9)] == [
        "–",
        "999 B",
        "28.3 MB",
        "1000 MB",
        "40.9 GB",
        "151 GB",
    ]
