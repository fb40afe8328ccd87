"""A change of the house changes no number: the tensors of a tiny job are those recorded before it."""

import json
from pathlib import Path

import torch

from tests import tiny_job

# Made by `python -m tests.tiny_job` at the commit before the redesign.
RECORDED = json.loads((Path(__file__).parent / "data" / "tiny_job.json").read_text())


def test_a_tiny_job_gives_the_tensors_recorded_before_the_redesign(tmp_path):
    threads = torch.get_num_threads()
    try:
        made = tiny_job.run(tmp_path)
        same_machine = tiny_job.arithmetic() == RECORDED["arithmetic"]
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "plan.json").read_text()) == RECORDED["plan"]
    for stage, folder in made.items():
        got, wanted = tiny_job.fingerprint(folder), RECORDED["stages"][stage]
        assert got.keys() == wanted.keys()
        for name in wanted:
            if same_machine:
                assert got[name]["sha256"] == wanted[name]["sha256"], f"{stage} {name}"
            torch.testing.assert_close(
                torch.tensor(got[name]["projections"]),
                torch.tensor(wanted[name]["projections"]),
                rtol=1e-3,
                atol=1e-4,
                msg=f"{stage} {name}",
            )
