"""Which stages of a result are read, and what is said of the others."""

import pytest

from ppcl.storage.results import read_results
from tests.ppcl.report import made


def test_selection_is_read_where_it_has_run(tmp_path):
    results = read_results(made.job(tmp_path / "job", made.MEASURED, detection=made.measured))
    assert results.stage("selection")["plan"] == made.selection()["plan"]
    assert "selection" not in results.absent


def test_a_missing_selection_is_told_where_the_configuration_runs_it(tmp_path):
    results = read_results(made.job(tmp_path / "job", ("detection",), detection=made.measured))
    assert results.absent["selection"] == "The stage selection has not run yet"


@pytest.mark.parametrize("detection", [{"method": "first_difference"}, {"method": "measured", "screening_steps": 0}])
def test_a_result_without_selection_is_complete_where_the_configuration_does_not_run_it(tmp_path, detection):
    results = read_results(made.job(tmp_path / "job", ("detection",), config={"detection": detection}))
    assert "selection" not in results.absent and results.stage("selection") == {}
    assert "students" in results.absent
