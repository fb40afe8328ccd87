import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ppcl.errors import UserError
from ppcl.report import summary_rows, write_report
from ppcl.report.page import best_of
from ppcl.report.terminal import benchmark_tables, summary_table
from tests.ppcl.report import made

EVIL = """<script>alert(1)</script>"><img src=x onerror="alert(2)"> $x$ & '"""


class Page(HTMLParser):
    """Elements, attributes and text of a report; elements must nest."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())


def read(root):
    return Page(write_report(root).read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    def verdicts(evaluation):
        return {
            **evaluation,
            "right": {name: [i % 3 > 0 for i in range(made.PROMPTS)] for name in evaluation["variants"]},
        }

    return made.job(tmp_path_factory.mktemp("report") / "job", evaluation=verdicts)


@pytest.fixture(scope="module")
def page(root):
    return read(root)


def test_the_report_says_which_prompts_its_figures_are_of(tmp_path, page):
    assert "the held-out prompts that variants were chosen on" in page.said, "a result of the previous version"
    splits = {"train": 438, "validation": 55, "test": 54, "seen_prompts": 2}
    said = read(made.job(tmp_path / "job", evaluation=lambda same: same | {"splits": splits})).said
    assert "54 prompts of the split test (fitted on 438 of train, chosen on 55 of validation)" in said
    images = len(json.loads((tmp_path / "job" / "evaluation" / "evaluation.json").read_text())["prompts"])
    assert f"2 of {images} test images show prompts of train or validation" in said


def test_the_report_has_every_section_and_loads_nothing(root, page):
    text = (root / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == [
        "Variants",
        "Quality against size",
        "Images from the same seeds",
        "Similarity of the blocks",
        "Distillation",
    ]
    without_pictures = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe", without_pictures)
    policy = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for attributes in page.all("img") + page.all("image"):
        assert (attributes.get("src") or attributes["href"]).startswith("data:image/png;base64,")


def test_header_tells_teacher_size_and_settings(page):
    for said in (
        "shapes-qwen",
        "4.81 M",
        "4 variants from one set of replacements, with 59 % to 88 %",
        "/models/shapes-qwen",
        "first_difference",
    ):
        assert said in page.said
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC", page.said)


def test_summary_rows_against_the_artifacts(root):
    rows = summary_rows(root)
    evaluation = json.loads((root / "evaluation/evaluation.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["teacher", "p90", "p80", "p70", "all"]
    assert [row["blocks"] for row in rows] == [16, 14, 12, 10, 9]
    last = rows[-1]
    assert last["share"] == last["parameters"] / rows[0]["parameters"]
    assert last["speed_up"] == pytest.approx(
        evaluation["teacher"]["seconds_per_step"] / evaluation["all"]["seconds_per_step"]
    )
    assert (last["world_low"], last["R_high"]) == (
        evaluation["all"]["world"]["overall"]["low"],
        evaluation["all"]["R_high"],
    )
    assert last["plan"] == [f"{u}-{v}" for u, v in made.INTERVALS] and rows[0]["psnr"] is None
    json.dumps(rows)


def test_every_figure_picture_and_table_header_can_be_read_aloud(page):
    labels = [svg["aria-label"] for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    # blocks, two of size, velocity, six categories, three heat maps twice, deltas, losses
    assert len(labels) == 1 + 2 + 1 + 6 + 6 + 1 + 1 and all(labels)
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r"url\(#([^)]+)\)", str(page.elements)) + [a["href"][1:] for a in page.all("use")]
    assert referred and set(referred) <= set(ids)


def test_pictures_are_the_files_and_say_whether_they_are_right(root, page):
    pictures = page.all("img")
    assert len(pictures) == 8 * 5
    assert all(picture["class"] == "pixelated" for picture in pictures)
    assert page.said.count("✗ wrong") == sum("found wrong" in picture["alt"] for picture in pictures) > 0
    shown = np.asarray(Image.open(_opened(pictures[0]["src"])))
    assert np.array_equal(shown, np.asarray(Image.open(root / "evaluation/pictures/teacher/0000.png")))
    categories = re.findall(
        r"(single object|two object|counting|colors|position|color attr)(?= teacher ✓| teacher ✗)", page.said
    )
    assert set(categories) == {"single object", "two object", "counting", "colors", "position", "color attr"}


def _opened(url):
    return io.BytesIO(base64.b64decode(url.partition(",")[2]))


def test_a_large_picture_is_shown_smaller(tmp_path):
    root = made.job(tmp_path / "job")
    noise = np.random.default_rng(0).integers(0, 255, (1024, 768, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "evaluation/pictures/teacher/0000.png")
    first = read(root).all("img")[0]
    assert first["src"].startswith("data:image/jpeg") and "class" not in first
    assert Image.open(_opened(first["src"])).size == (288, 384)


def test_the_size_that_is_told_is_that_of_the_images(tmp_path):
    """A pipeline may round the size that was asked for."""
    root = made.job(tmp_path / "job")
    path = root / "evaluation" / "evaluation.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"sampling": record["sampling"] | {"height": 44, "width": 36}}))
    for picture in (root / "evaluation" / "pictures" / "teacher").glob("*.png"):
        Image.new("RGB", (32, 40)).save(picture)
    assert "20 steps, 32 × 40 pixels" in read(root).said


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((), ["detection", "students", "variants", "evaluation"]),
        (("detection",), ["students", "variants", "evaluation"]),
        (("detection", "students", "variants"), ["evaluation"]),
        (("evaluation",), ["detection", "students", "variants"]),
    ],
)
def test_a_stage_that_is_not_there_is_told(tmp_path, stages, told):
    page = read(made.job(tmp_path / "job", stages=stages))
    assert sorted(set(re.findall(r"The stage (\w+) has not run yet", page.said))) == sorted(told)
    console = Console(width=160, record=True)
    console.print(summary_table(tmp_path / "job"))
    assert "variant" in console.export_text()


def test_a_damaged_stage_is_told_and_the_rest_shown(tmp_path):
    root = made.job(tmp_path / "job")
    (root / "detection/detection.json").write_text('{"blocks": 16, "cka"')
    (root / "students/training.json").unlink()
    said = read(root).said
    assert "detection/detection.json cannot be read" in said and "students/training.json is missing" in said
    assert "Checker score by category" in said


def test_a_folder_that_is_no_job_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a ppcl result"):
        write_report(tmp_path)


def test_names_and_prompts_are_text_and_never_markup(tmp_path):
    def evil(evaluation):
        rename = lambda same: {(EVIL if key == "p90" else key): value for key, value in same.items()}  # noqa: E731
        variants = rename(evaluation["variants"])
        for measured in variants.values():
            measured["world"]["categories"] = {EVIL: measured["world"]["categories"]["counting"]}
        prompts = [{"text": EVIL, "category": EVIL}, *evaluation["prompts"][1:]]
        return {**evaluation, "variants": variants, "prompts": prompts, "device": EVIL}

    root = made.job(tmp_path / "job", stages=("evaluation",), evaluation=evil)
    page = read(root)
    assert not page.all("script") and not any(key.startswith("on") for _, a in page.elements for key in a)
    assert {image["src"][:5] for image in page.all("img")} == {"data:"}
    assert EVIL in "".join(page.text), "shown as it was given"
    assert html.escape(EVIL, quote=False)[:20] in (root / "report.html").read_text()


def test_a_variants_name_cannot_reach_outside_the_pictures(tmp_path):
    def away(evaluation):
        return {**evaluation, "variants": {**evaluation["variants"], "../../outside": evaluation["variants"]["all"]}}

    root = made.job(tmp_path / "job", evaluation=away)
    (root / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(root / "outside/0000.png")
    outside = [image for image in read(root).all("img") if "outside" in image["alt"]]
    assert outside == []


def test_what_was_not_measured_is_a_dash_and_nan_is_no_crash(tmp_path):
    def bare(evaluation):
        nothing = {"world": None, "psnr": None, "ssim": None, "R": None, "R_low": None, "R_high": None}
        variants = {name: {**measured, **nothing} for name, measured in evaluation["variants"].items()}
        variants["all"]["velocity_error"] = float("nan")
        return {**evaluation, "variants": variants, "prompts": [{**p, "category": None} for p in evaluation["prompts"]]}

    def diverged(training):
        training["replacements"]["4-6"]["curve"][-1].update(loss=float("nan"), img=float("inf"))
        training["replacements"]["1-2"]["curve"] = []
        return training

    root = made.job(tmp_path / "job", evaluation=bare, students=diverged)
    said = read(root).said
    assert "Checker score by category" not in said and "nan" not in said.lower()
    assert summary_rows(root)[-1]["velocity_error"] is None


def test_sixty_blocks_in_two_lists_without_any_interval(tmp_path):
    def large(detection):
        cka = [[None if k < u else 1 - 0.01 * (k - u) for k in range(60)] for u in range(60)]
        tables = {"img": cka, "txt": cka, "mean": cka}
        return {
            **detection,
            "blocks": 60,
            "spans": [[0, 19], [19, 60]],
            "cka": tables,
            "delta": cka,
            "intervals": [],
            "plan": [],
        }

    page = read(made.job(tmp_path / "job", stages=("detection",), detection=large))
    assert "No contiguous redundant interval was found" in page.said
    assert any("60 by 60 blocks, from 0.410 to 0.990" in svg.get("aria-label", "") for svg in page.all("svg"))


def test_best_is_hinted_at_only_where_variants_can_be_told_apart():
    row = dict.fromkeys(("speed_up", "psnr", "ssim", "world", "R", "velocity_error"))
    rows = [
        {**row, "variant": "teacher", "world": 1.0, "velocity_error": 0.0},
        {**row, "variant": "a", "world": 0.8, "velocity_error": 0.3, "R": 2.0, "psnr": 30.0},
        {**row, "variant": "b", "world": 0.8, "velocity_error": 0.2, "R": -1.0},
    ]
    assert best_of(rows) == {"velocity_error": "b", "R": "b"}


def test_scores_by_benchmark_have_a_column_each_with_intervals(tmp_path):
    stages = ("detection", "students", "variants", "evaluation", "scores")
    root = made.job(tmp_path / "job", stages, {"evaluation": {"scorers": {"pick": {"call": "pick_score"}}}})
    page = read(root)
    assert "Scores by benchmark" in page.said
    for heading in (
        "pick 60 prompts",
        "pick on dpg",
        "reward on dpg",
        "lpips on dpg 60 prompts, smaller is better",
        "mean R",
    ):
        assert heading in page.said
    reward = made.scores()["benchmarks"][2]["variants"]["p80"]
    assert f"\u2212{-reward['difference']:.3f} (\u2212{-reward['difference_low']:.3f} to " in page.said
    record = made.scores()["benchmarks"][0]["variants"]["p80"]
    assert f"{record['score']:.1f} {record['low']:.1f} to {record['high']:.1f}" in page.said
    assert f"{record['R']:.1f} % ({record['R_low']:.1f} to {record['R_high']:.1f})" in page.said
    rows = {row["variant"]: row["scores"] for row in summary_rows(root)}
    assert rows["p80"]["pick"] == record and rows["p80"]["reward on dpg"]["R"] is None
    console = Console(width=160, record=True)
    for table in benchmark_tables(made.scores()["benchmarks"]):
        console.print(table)
    told = console.export_text()
    assert "lpips on dpg, 60 prompts, smaller is better" in told and re.search(r"p80\s*│\s*20\.4 \(", told)


def test_scores_that_were_not_made_yet_are_told(tmp_path):
    config = {"evaluation": {"scorers": {"pick": {"call": "pick_score"}}}}
    assert "The stage scores has not run yet" in read(made.job(tmp_path / "job", config=config)).said


def test_terminal_table_holds_the_summary(root):
    console = Console(width=160, record=True)
    console.print(summary_table(root))
    text = console.export_text()
    for heading in (
        "variant",
        "blocks",
        "parameters",
        "share",
        "seconds per step",
        "velocity error",
        "checker score",
        "R",
    ):
        assert heading in text
    assert re.search(r"p70\s*│\s*10\s*│\s*3\.13 M\s*│\s*65\.1\s%", text)


EVERY = ("detection", "students", "variants", "finetuning", "evaluation", "ablation")


def test_fine_tuning_and_ablation_are_told_and_drawn(tmp_path):
    page = read(made.job(tmp_path / "job", EVERY))
    assert "Of 22 measured plans, 20 have a smaller velocity error after it" in page.said
    assert (
        "by the other measured plans, 19 of the 20 random plans would use them; 1 of these is worse with them."
        in page.said
    )
    assert "6 of 16 blocks removed, 200 distillation steps per row, 3 seeds" in page.said
    for row in made.ablation()["rows"]:
        assert row["label"].strip() in page.said
    told = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    assert any(
        text.startswith("Velocity error of 22 plans before and after fine-tuning; 20 of them are better")
        for text in told
    )
    assert any(
        text.startswith("Velocity error by row of the ablation. CKA sensitivity, sequential: 0.02") for text in told
    )


def test_numbers_on_a_logarithmic_axis_are_plain(tmp_path):
    """Over less than a decade too, where matplotlib writes powers of ten that only TeX can read."""
    text = write_report(made.job(tmp_path / "job", EVERY)).read_text()
    assert "mathdefault" not in text and "10^" not in text
    assert "0.05</text>" in text
