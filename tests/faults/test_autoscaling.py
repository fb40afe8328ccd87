"""Jobs on a cluster that has no workers: its autoscaler brings the nodes, and takes them away."""

import pytest

from tests.autoscaling import autoscaling
from tests.faults.jobs import Job, environment, same, students

pytestmark = pytest.mark.faults


def test_a_job_runs_to_its_end_on_a_cluster_that_has_nothing_at_first(values, undisturbed, tmp_path):
    with autoscaling(env=environment(), cpu=({"CPU": 2}, 2)) as address:
        job = Job(values, tmp_path / "result", address=address).end()
    assert (
        "calibration: waiting for nodes, 5 min 0 s from the last new one: calibration.workers asks for 1 worker, "
        in job.said
    )
    assert "failed (" not in job.said and "report: " in job.said
    same(students(job.output), undisturbed)


def test_a_job_that_asks_for_more_than_there_can_be_ends_in_one_sentence(values, tmp_path):
    with autoscaling(cpu=({"CPU": 2}, 2)) as address:
        job = Job(values, tmp_path / "result", address=address, distillation__replicas=4).end(2)
    assert job.error == (
        "ppcl: distillation.pipeline_parallel × distillation.data_parallel asks for 8 workers, but the cluster has "
        "0 CPUs, of which 0 can be used by workers, and its autoscaler cannot bring it to 9 CPUs; ask for fewer or "
        "raise what it may add"
    )
    assert "calibration: " not in job.said and "Traceback" not in job.said
