"""A result that the version before the redesign wrote stays readable."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl.evaluation.images import generate_images
from ppcl.report import summary_rows, write_report
from ppcl.result import Result

WRITTEN = Path(__file__).parent / "data" / "result-0.1.0"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(WRITTEN / "result", tmp_path / "result")


def test_its_variants_are_opened_and_draw_the_pictures_that_were_evaluated(folder):
    result = Result(folder, teacher=WRITTEN / "teacher")
    assert {name: (v.blocks, v.parameters) for name, v in result.variants.items()} == {
        "teacher": (4, 166_160),
        "p80": (4, 122_096),
        "all": (1, 42_128),
    }
    prompts = [
        prompt["text"] for prompt in json.loads((folder / "evaluation" / "evaluation.json").read_text())["prompts"]
    ]
    pipeline = result.pipeline("teacher")
    for name in result.variants:
        result.switch(pipeline, name)
        with torch.no_grad():
            made = generate_images(pipeline, prompts, [1_000_000, 1_000_001], result.sampling)
        kept = np.stack(
            [np.asarray(Image.open(folder / "evaluation" / "pictures" / name / f"{i:04d}.png")) for i in range(2)]
        )
        # Rounded to 8 bits, on another machine perhaps.
        assert np.abs(made.astype(int) - kept.astype(int)).max() <= 2, name


def test_its_tables_and_its_report_are_written_anew(folder):
    rows = summary_rows(folder)
    assert [row["variant"] for row in rows] == ["teacher", "p80", "all"] and rows[2]["velocity_error"] == pytest.approx(
        0.00115, rel=0.01
    )
    assert "p80" in write_report(folder).read_text()
