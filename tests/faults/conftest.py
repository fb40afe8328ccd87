"""One small job that nothing disturbed, for all of them."""

import os

import pytest

from tests.faults.jobs import EVERY, STEPS, Job, before, students
from tests.jobs.test_submission import cluster, head, store  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def values(tmp_path_factory, teacher_folder):
    os.environ.setdefault("RAY_worker_niceness", "0")
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(
        "\n".join(f"a {c} {s}" for c in ("red", "green", "blue", "black") for s in ("circle", "square", "cross"))
    )
    return {
        "teacher": str(teacher_folder),
        "prompts": str(prompts),
        "device": "cpu",
        "sampling": {"steps": 3, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "validation": 0.3, "batch_size": 4},
        "probes": {"workers": 2, "batch_size": 4},
        "detection": {"method": "first_difference"},
        "width": {"ffn_keep_percents": [50], "text": False, "linear_ffns": 1},
        # Every replacement is trained, so that the steps of each can be counted.
        "distillation": {
            "train": "all",
            "steps": STEPS,
            "batch_size": 4,
            "warmup": 2,
            "pipeline_parallel": 2,
            "checkpoint_every": EVERY,
        },
        "variants": {"budgets": [0.9]},
        "evaluation": {"max_prompts": 2},
    }


@pytest.fixture(scope="session")
def whole(values, tmp_path_factory):
    """The folder of a job that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "result"
    return Job(values, output).end().output


@pytest.fixture(scope="session")
def undisturbed(whole):
    return students(whole)


@pytest.fixture
def result(whole, tmp_path):
    """A copy of that folder that has come to the students."""
    return before(whole, "students", tmp_path)
