"""`ppcl images` and `ppcl score`: images for harnesses elsewhere, and the way back of their numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppcl.report.summary import summary_rows
from ppcl.storage.manifest import Artifacts
from tests import made_result

SUITE = [
    {"prompt": "a red circle", "id": "one", "category": "colour", "questions": [["Is it red?", "yes"]]},
    {"prompt": "a blue square", "id": "two", "category": "shape", "questions": []},
]


@pytest.fixture(scope="module")
def result(tmp_path_factory, teacher_folder):
    return made_result.result(tmp_path_factory.mktemp("result") / "job", teacher_folder)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "geneval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUITE))
    return path


@pytest.fixture
def drawn(result, suite, ppcl, tmp_path):
    """The folder of two images a prompt by p90, and the lines of its list."""
    folder = tmp_path / "images"
    more = ["--variant", "p90", "--images-per-prompt", "2", "--seed", "5", "--batch-size", "3"]
    code, said, error = ppcl("images", result, "--suite", suite, "--to", folder, *more)
    assert code == 0, error
    assert f"{folder}/pictures.jsonl: 8 images of 2 prompts, 2 variants with the teacher" in said
    return folder, lines(folder / "pictures.jsonl")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_scores(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_list_has_what_harnesses_read_and_what_ties_scores_to_images(drawn):
    folder, rows = drawn
    assert [row["file"] for row in rows[:5]] == [
        *(f"teacher/{index:05d}.png" for index in range(4)),
        "p90/00000.png",
    ]
    last = rows[-1]
    assert (last["id"], last["category"], last["seed"], last["questions"]) == ("two", "shape", 6, [])
    assert Path(last["image_path"]) == folder.absolute() / "p90" / "00003.png"
    assert Path(last["reference_image_path"]) == folder.absolute() / "teacher" / "00003.png"
    for row in rows:
        assert Image.open(row["image_path"]).size == (32, 32)


def test_an_image_is_the_one_that_generate_makes(drawn, result, ppcl, tmp_path):
    _, rows = drawn
    one = next(row for row in rows if row["variant"] == "p90" and row["id"] == "two" and row["seed"] == 6)
    code, _, error = ppcl(
        "generate", result, "a blue square", "--variant", "p90", "--seed", "6", "-o", tmp_path / "a.png"
    )
    assert code == 0, error
    made, listed = (np.asarray(Image.open(path), int) for path in (tmp_path / "a.png", one["image_path"]))
    # Batches of another size round differently.
    assert np.abs(made - listed).max() <= 1


def test_a_second_run_draws_what_is_missing_and_changes_nothing_else(drawn, result, suite, ppcl):
    folder, rows = drawn
    kept = folder / "p90" / "00001.png"
    before = kept.stat().st_mtime_ns
    (folder / "p90" / "00000.png").unlink()
    more = ["--variant", "p90", "--images-per-prompt", "2", "--batch-size", "3"]
    code, _, error = ppcl("images", result, "--suite", suite, "--to", folder, *more, "--seed", "5")
    assert code == 0 and kept.stat().st_mtime_ns == before and lines(folder / "pictures.jsonl") == rows, error
    code, _, error = ppcl("images", result, "--suite", suite, "--to", folder, *more, "--seed", "6")
    assert code == 2 and "holds images of another suite, result, seed or choice of variants" in error


def test_scores_come_back_into_the_table_the_report_and_the_server(drawn, result, ppcl, tmp_path):
    folder, rows = drawn
    value = {"teacher": 0.8, "p90": 0.6}
    # As a harness that knows paths alone.
    given = [{"image_path": row["image_path"], "score": value[row["variant"]]} for row in rows]
    scores = write_scores(tmp_path / "scores.jsonl", given)
    code, said, error = ppcl("score", result, "--from", scores, "--images", folder, "--name", "geneval2")
    assert code == 0, error
    assert "geneval2 on geneval, 2 prompts" in said and "25.0\u202f%" in said
    table = {row["variant"]: row["scores"] for row in summary_rows(result)}
    assert table["p90"]["geneval2 on geneval"]["R"] == pytest.approx(25) and table["p75"] == {}
    assert "geneval2 on geneval" in (result / "report.html").read_text()
    code, said, _ = ppcl("variants", result)
    assert code == 0 and "geneval2 on geneval, 2 prompts" in said

    from serve.engine.loading import qualities

    assert qualities(result, ["teacher", "p90", "p75"], "geneval2") == {"teacher": 1, "p90": 0.75, "p75": None}
    # Another name stays beside it.
    write_scores(scores, [row | {"score": -1} for row in given])
    code, _, error = ppcl("score", result, "--from", scores, "--images", folder, "--name", "reward")
    assert code == 0 and len(summary_rows(result)[0]["scores"]) == 2, error


def test_scores_of_a_result_that_changed_count_no_more(drawn, result, ppcl, teacher_folder, tmp_path):
    folder, rows = drawn
    other = made_result.result(tmp_path / "other", teacher_folder)
    scores = write_scores(tmp_path / "scores.jsonl", [{"file": row["file"], "score": 1} for row in rows])
    arguments = ["--from", scores, "--images", folder, "--name", "mine"]
    # The same weights and plans: the same result.
    assert ppcl("score", other, *arguments)[0] == 0
    assert summary_rows(other)[0]["scores"]
    Artifacts(other).path("students", "more.json").write_text("{}")
    Artifacts(other).commit("students", "0")
    assert not summary_rows(other)[0]["scores"]
    code, _, error = ppcl("score", other, *arguments)
    assert code == 2 and "are of another result than" in error and "draw them again" in error


MISTAKES = {
    "another image": (
        lambda rows: [*rows, {"file": "p90/00009.png", "score": 1}],
        "'p90/00009.png', which is no image",
    ),
    "not a number": (lambda rows: [{**rows[0], "score": "good"}, *rows[1:]], "line 1 has the score 'good'"),
    "not finite": (lambda rows: [{**rows[0], "score": float("nan")}, *rows[1:]], "line 1 has the score nan"),
    "one missing": (lambda rows: rows[:-1], "has no score of p90/00003.png; score all images of a variant, or none"),
    "twice": (lambda rows: [*rows, rows[0]], "line 9 scores teacher/00000.png a second time"),
    "other pixels": (lambda rows: [{**rows[0], "sha256": "0"}, *rows[1:]], "its sha256 differs; score these images"),
    "none": (lambda rows: [], "holds no scores"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_scores_that_cannot_be_taken_are_refused(drawn, result, ppcl, tmp_path, mistake):
    folder, rows = drawn
    change, sentence = MISTAKES[mistake]
    scores = write_scores(tmp_path / "scores.jsonl", change([{"file": row["file"], "score": 1} for row in rows]))
    code, _, error = ppcl("score", result, "--from", scores, "--images", folder, "--name", "wrong")
    assert code == 2 and sentence in error and len(error.splitlines()) == 1
    assert not any("wrong" in name for row in summary_rows(result) for name in row["scores"])


def test_an_image_that_was_changed_is_found(drawn, result, ppcl, tmp_path):
    folder, rows = drawn
    scores = write_scores(tmp_path / "scores.jsonl", [{"file": row["file"], "score": 1} for row in rows])
    (folder / "p90" / "00002.png").write_bytes((folder / "p90" / "00001.png").read_bytes())
    code, _, error = ppcl("score", result, "--from", scores, "--images", folder, "--name", "wrong")
    assert code == 2 and "p90/00002.png is not the image that was drawn" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["images", "{result}", "--suite", "{here}/gone.jsonl", "--to", "{here}/new"], "gone.jsonl does not exist"),
        (["images", "{result}", "--suite", "{suite}", "--to", "{here}", "--variant", "p10"], "no variant 'p10'"),
        (["images", "{result}", "--suite", "{suite}", "--to", "{here}"], "is not empty and holds no images of ppcl"),
        (["images", "{result}", "--suite", "{suite}", "--to", "s3://b/k"], "give a folder of this machine"),
        (["images", "{result}", "--suite", "{suite}", "--to", "gs://b/k"], "gs:// is not served"),
        (["score", "{result}", "--from", "x", "--images", "{here}", "--name", "a"], "holds no run.json"),
        (["score", "{result}", "--from", "x", "--images", "{here}", "--name", "../a"], "'../a' is no name"),
        (["score", "{here}", "--from", "x", "--images", "{here}", "--name", "a"], "is not a ppcl result"),
    ],
)
def test_mistakes_are_told_in_one_sentence(result, suite, ppcl, tmp_path, arguments, sentence):
    (tmp_path / "file").write_text("")
    code, _, error = ppcl(*(a.format(result=result, here=tmp_path, suite=suite) for a in arguments))
    assert code == 2 and sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
