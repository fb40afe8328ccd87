"""The table of schedulers names those that ppcl takes, each with the families that it works with."""

import re
from pathlib import Path

from ppcl.models.schedulers import SOLVERS
from tests.schedulers import CASES, WORKING

PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts.md"
FAMILIES = {"qwen": "Qwen-Image", "flux": "FLUX.1", "sd3": "Stable Diffusion 3.5"}


def test_the_table_has_every_scheduler_and_the_families_that_it_works_with():
    rows = dict(re.findall(r"^\| `(\w+Scheduler)` \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() == SOLVERS.keys()
    for solver, named in rows.items():
        works = {family for name, family in WORKING if CASES[name].name == solver}
        told = set(FAMILIES) if named == "all families" else {f for f, full in FAMILIES.items() if full in named}
        assert told == works, solver
