"""The recipes of docs/scorers.md, run as they stand on images that are there and on what each harness writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ppcl.evaluation.picture_list import Picture, foreign_scores

PAGE = Path(__file__).parents[2] / "docs" / "scorers.md"
PROMPTS = {"0": "a green backpack", "17": "seven green croissants"}


def recipes(title):
    """The Python blocks of a section."""
    section = PAGE.read_text().split(f"### {title}\n")[1].split("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Images of two prompts by two variants in `images/NAME`, with their list; gives a function of the name."""
    monkeypatch.chdir(tmp_path)

    def made(name):
        folder, found = tmp_path / "images" / name, []
        for variant in ("teacher", "half"):
            for number, (key, prompt) in enumerate(PROMPTS.items()):
                file = f"{variant}/{number:05d}.png"
                (folder / variant).mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(file.encode())
                found.append(Picture(file, variant, key, prompt, None, 0, "hash", "made", {}))
        (folder / "pictures.jsonl").write_text("".join(picture.line(folder) for picture in found))
        return found

    return made


def test_geneval_2_there_and_back(pictures):
    found = pictures("geneval2")
    there, back = recipes("GenEval 2")
    exec(there, {})
    for variant, atoms in (("teacher", [[0.9, 0.4], [1.0]]), ("half", [[0.5, 0.5], [0.25]])):
        paths = json.loads(Path(f"{variant}.json").read_text())
        assert list(paths) == list(PROMPTS.values())
        assert [Path(path).read_bytes().decode() for path in paths.values()] == [
            f"{variant}/0000{number}.png" for number in (0, 1)
        ]
        Path(f"{variant}-scores.json").write_text(json.dumps(atoms))
    exec(back, {})
    scores = foreign_scores("scores.jsonl", found)
    np.testing.assert_allclose(scores["teacher"][""], [0.6, 1.0])
    np.testing.assert_allclose(scores["half"][""], [0.5, 0.25])


def test_dpg_bench_there_and_back(pictures):
    suite, there, back = recipes("DPG-Bench")
    for key, prompt in PROMPTS.items():
        Path("dpg_bench/prompts").mkdir(parents=True, exist_ok=True)
        Path("dpg_bench/prompts", f"{key}.txt").write_text(prompt + "\n")
    exec(suite, {})
    rows = [json.loads(line) for line in Path("dpg.jsonl").read_text().splitlines()]
    assert {row["id"]: row["prompt"] for row in rows} == PROMPTS
    found = pictures("dpg")
    exec(there, {})
    assert Path("dpg/half/17.png").read_bytes() == b"half/00001.png"
    for variant, scores in (("teacher", {"0": 0.9, "17": 0.8}), ("half", {"0": 0.7, "17": 0.25})):
        # As its script writes them, with a summary at the end.
        lines = [f"dpg/{variant}/{key}.png, {score}, {score}\n" for key, score in scores.items()]
        Path(f"{variant}.txt").write_text("".join(lines) + f"Image path: dpg/{variant}\nL1-entity: 80.1\n")
    exec(back, {})
    given = foreign_scores("scores.jsonl", found)
    assert given["teacher"][""].tolist() == [0.9, 0.8] and given["half"][""].tolist() == [0.7, 0.25]
