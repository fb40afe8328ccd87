"""A job that is run again with another configuration in the same folder gives what a fresh folder gives."""

import io
import json

import pytest
from rich.console import Console

from jobs.pipeline import Job
from ppcl.config.schema import Config
from tests.one_process import stages_in_this_process


@pytest.fixture(scope="module")
def values(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.txt").write_text(
        "\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in ("cat", "cow"))
    )
    return {
        "teacher": teacher_folder,
        "prompts": folder / "prompts.txt",
        "device": "cpu",
        "sampling": {"steps": 2, "height": 16, "width": 16},
        "calibration": {"states_per_prompt": 2, "validation": 0.3},
        "detection": {"method": "first_difference"},
        "distillation": {"steps": 2, "batch_size": 4, "warmup": 1},
        "finetuning": {"steps": 1, "batch_size": 4, "warmup": 0, "measured_plans": 1},
        "variants": {"budgets": [0.7]},
        "evaluation": {"max_prompts": 2},
    }


def run(values, output, **changes):
    """The job's lines."""
    job = Job(Config(**values | changes, output=output), Console(file=io.StringIO(), width=300))
    with stages_in_this_process():
        job.run("cpu")
    return job.reporter.console.file.getvalue()


def test_another_width_section_in_the_same_folder_gives_the_variants_of_a_fresh_one(ray_cluster, values, tmp_path):
    """Text runs and FFNs of the plan before would be better than what is left, and be taken."""
    narrow = {"text": False, "low_rank_modulations": False, "linear_ffns": 0, "ffn_keep_percents": []}
    run(values, tmp_path / "twice", width={"text_similarity": 0.2, "ffn_keep_percents": [50]})
    run(values, tmp_path / "twice", width=narrow)
    run(values, tmp_path / "fresh", width=narrow)
    names = [sorted(path.name for path in (tmp_path / name / "students").iterdir()) for name in ("twice", "fresh")]
    assert names[0] == names[1]
    variants = [json.loads((tmp_path / name / "variants" / "variants.json").read_text()) for name in ("twice", "fresh")]
    assert variants[0] == variants[1]
