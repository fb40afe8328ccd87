"""The report as one HTML file that loads nothing: figures as inline SVG, images as data URLs, no script."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ppcl.config.location import LocationLike
from ppcl.replacements import Interval, TextRun, parse_replacement, sort_key
from ppcl.report import figures, numbers
from ppcl.report.benchmarks import benchmark_table
from ppcl.report.measured import CLOSED_FORM, FINAL, SCREENED, measured_detection, sensitivities
from ppcl.report.pictures import drawn_size, picture_rows
from ppcl.report.summary import finite, rows_of
from ppcl.search.variants import TEACHER
from ppcl.storage.manifest import Artifacts, write_atomically
from ppcl.storage.mirror import upload
from ppcl.storage.results import Results, read_results

REPORT = "report.html"

STREAMS = {"img": "image stream", "txt": "text stream", "mean": "mean of both"}

# Columns whose best variant is hinted at; what follows from the size alone is not.
_HIGHER_IS_BETTER = {
    "speed_up": True,
    "velocity_error": False,
    "psnr": True,
    "ssim": True,
    "world": True,
    "R": False,
}


def write_report(root: LocationLike) -> Path:
    """Write `report.html` at the job's root from the stages that are there, and return its path.

    Raises `UserError` where `root` is no job's folder or the file cannot be written.
    """
    artifacts = Artifacts(root)
    if artifacts.store:
        # Its images come to this node.
        artifacts.damaged("evaluation")
    results = read_results(root)
    environment = Environment(
        loader=PackageLoader("ppcl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["numbers"] = numbers
    html = environment.get_template("report.html.j2").render(_context(results))
    path = results.root / REPORT
    write_atomically(path, html)
    upload(path)
    return path


def _context(results: Results) -> dict[str, Any]:
    rows = rows_of(results)
    looks = figures.series_of([row["variant"] for row in rows])
    detection, evaluation = results.stage("detection"), results.stage("evaluation")
    measured = evaluation.get("variants", {})
    quality = [
        figures.size_scatter(rows, looks, "R", "R"),
        figures.size_scatter(rows, looks, "velocity_error", "Velocity error"),
    ]
    return {
        "teacher": _teacher_name(results.manifest["job"]),
        "lead": _lead(rows),
        "facts": _facts(results),
        "settings": _settings(results),
        "level": _level(results.config),
        "stages": results.manifest["stages"],
        "absent": results.absent,
        "rows": rows,
        "best": best_of(rows),
        "block_map": _block_map(results, rows),
        "detection": detection,
        "intervals": _by_similarity(detection),
        "interval_name": figures.interval_name,
        "heat_maps": _heat_maps(detection, "cka"),
        "heat_maps_standardized": _heat_maps(detection, "cka_standardized"),
        "deltas": _deltas(detection),
        "measured": measured_detection(results),
        "training": results.stage("students"),
        "losses": _losses(results.stage("students")),
        "text_map": _text_map(detection),
        "finetuning": _finetuning(results.stage("finetuning")),
        "students": _students(results),
        "ablation": results.stage("ablation"),
        "ablation_drawing": figures.ablation_bars(results.stage("ablation")["rows"])
        if results.stage("ablation")
        else None,
        "benchmarks": benchmark_table(results),
        "velocity": figures.velocity_curves(measured, looks),
        "quality": [drawing for drawing in quality if drawing],
        "categories": figures.category_scores(measured, looks),
        "pictures": picture_rows(results, list(looks)),
        "sampling": evaluation.get("sampling", {}) | drawn_size(results),
    }


def _teacher_name(job: dict[str, Any]) -> str:
    return Path(str(job.get("teacher", TEACHER))).name


def _lead(rows: list[dict[str, Any]]) -> str:
    """The result in one sentence."""
    shares = sorted(row["share"] for row in rows if row["variant"] != TEACHER and row["share"] is not None)
    if not shares:
        return "No variant has been made yet."
    low, high = (numbers.percent(share, 0) for share in (shares[0], shares[-1]))
    if len(shares) == 1:
        return f"One variant, with {low} of the teacher's parameters."
    return f"{len(shares)} variants from one set of replacements, with {low} to {high} of the teacher's parameters."


def _facts(results: Results) -> list[tuple[str, str]]:
    """The facts about the job in the header."""
    made = results.stage("variants").get("teacher", {})
    blocks = made.get("blocks", results.stage("detection").get("blocks"))
    facts = [
        ("Blocks", None if blocks is None else str(blocks)),
        ("Parameters", numbers.count(made["parameters"]) if made else None),
        ("Device", results.stage("evaluation").get("device")),
        ("Measured on", _measured_on(results.stage("evaluation"))),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("ppcl", _version()),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _measured_on(evaluation: dict[str, Any]) -> str | None:
    """Which prompts the figures of the variants are of; None where there are none."""
    if not evaluation:
        return None
    splits = evaluation.get("splits")
    if splits is None:
        return "the held-out prompts that variants were chosen on"
    told = (
        f"{splits['test']} prompts of the split test (fitted on {splits['train']} of train, chosen on "
        f"{splits['validation']} of validation)"
    )
    seen, images = splits["seen_prompts"], len(evaluation["prompts"])
    return told + (f"; {seen} of {images} test images show prompts of train or validation" if seen else "")


def _version() -> str:
    try:
        return metadata.version("ppcl")
    except metadata.PackageNotFoundError:
        return "from source"


def _settings(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """The job's full configuration by section, its identity first."""
    groups = {"job": dict(results.manifest["job"])}
    for name, value in results.config.items():
        if isinstance(value, dict):
            groups[name] = value
        else:
            groups["job"].setdefault(name, value)
    told = {name: [(key, str(value)) for key, value in values.items()] for name, values in groups.items()}
    return [(name, pairs) for name, pairs in told.items() if pairs]


def _level(config: dict[str, Any]) -> str:
    """The confidence intervals' level as a clause, empty where it is not known."""
    level = config.get("evaluation", {}).get("confidence")
    return f" ({numbers.percent(level)} level, over prompts)" if level else ""


def best_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The best variant of each measured column; none where fewer than two were measured or the best is a tie."""
    best = {}
    for key, higher in _HIGHER_IS_BETTER.items():
        found = sorted(
            ((row[key], row["variant"]) for row in rows if row["variant"] != TEACHER and row[key] is not None),
            reverse=higher,
        )
        if len(found) > 1 and found[0][0] != found[1][0]:
            best[key] = found[0][1]
    return best


def _block_map(results: Results, rows: list[dict[str, Any]]) -> figures.Drawing | None:
    teacher = results.stage("variants").get("teacher")
    return figures.block_map(rows, teacher["blocks"], teacher["spans"]) if teacher else None


def _by_similarity(detection: dict[str, Any]) -> list[figures.BlockPair]:
    """The intervals that similarity gives: those of Algorithm 1 where the job's own were measured."""
    chosen = "first_difference" if "measured" in detection else "intervals"
    return [(first, last) for first, last in detection.get(chosen, [])]


def _heat_maps(detection: dict[str, Any], key: str) -> list[figures.Drawing]:
    """The heat maps of all streams on one scale, so that they can be compared."""
    tables = detection.get(key) or {}
    values = [value for table in tables.values() for row in table for value in row if finite(value) is not None]
    low = min(values, default=0.0)
    low = low if low < 1 else 0.0
    return [
        figures.heat_map(
            f"{key}-{stream}", STREAMS[stream], tables[stream], _by_similarity(detection), detection["spans"], low
        )
        for stream in STREAMS
        if stream in tables
    ]


def _finetuning(tuned: dict[str, Any]) -> dict[str, Any] | None:
    """The data of the section on fine-tuning; None if there was none."""
    if not tuned:
        return None
    plans = tuned["plans"]
    ratios = sorted(row["after"] / row["before"] for row in plans if row["before"])
    # One that is trained in full is measured for itself.
    drawn = [row for row in plans if row["variant"] is None and tuned.get("train") != "all"]
    taken = [row for row in drawn if row["taken"]]
    return {
        "steps": tuned["steps"],
        "fixed": tuned["fixed"],
        # Results of the version before have replacements trained alone.
        "in_full": tuned.get("train") == "all",
        "variants": [row for row in plans if row["variant"]],
        "plans": len(plans),
        "better": sum(row["after"] < row["before"] for row in plans),
        "drawn": len(drawn),
        "taken": len(taken) if drawn else None,
        "spoilt": sum(row["after"] > row["before"] for row in taken),
        "median": ratios[len(ratios) // 2] if ratios else None,
        "losses": figures.loss_curves({"velocity": tuned}) if tuned["curve"] else None,
        "drawing": figures.before_and_after(plans),
    }


def _text_map(detection: dict[str, Any]) -> figures.Drawing | None:
    """The text stream against itself, with the runs outlined; None where no text run was looked for."""
    table = detection.get("text_map")
    if not table:
        return None
    runs = [entry for entry in map(parse_replacement, detection["plan"]) if isinstance(entry, TextRun)]
    low = min((value for row in table for value in row if finite(value) is not None), default=0.0)
    return figures.heat_map(
        "text-map",
        "text stream",
        table,
        [(run.first, run.last) for run in runs],
        detection["spans"],
        low if low < 1 else 0.0,
        figures.SAME_STREAM,
    )


def _losses(training: dict[str, Any]) -> figures.Drawing | None:
    """The curves of what was trained by gradient, without FFNs: they are many, and start at their loss's optimum."""
    trained = training.get("replacements", {})
    drawn = {
        text: told
        for text, told in trained.items()
        if told["curve"] and isinstance(parse_replacement(text), Interval | TextRun)
    }
    return figures.loss_curves(drawn) if drawn else None


def _deltas(detection: dict[str, Any]) -> figures.Drawing | None:
    if not detection:
        return None
    return figures.delta_curves(detection["delta"], _by_similarity(detection), detection["spans"])


def _students(results: Results) -> list[dict[str, Any]]:
    """One dict a replacement that was trained: its losses at the start and the end, and its sensitivities; by kind."""
    times = sensitivities(results)
    trained = {
        parse_replacement(text): told for text, told in results.stage("students").get("replacements", {}).items()
    }
    students = []
    for replacement in sorted(trained, key=lambda one: (one.label.lower(), sort_key(one))):
        curve = trained[replacement]["curve"]
        students.append(
            {
                "kind": replacement.label,
                "blocks": replacement.where,
                "removed": replacement.removed,
                "first": finite(curve[0]["loss"]) if curve else None,
                "last": finite(curve[-1]["loss"]) if curve else None,
                "seconds": finite(trained[replacement].get("seconds")),
                "closed_form": times[CLOSED_FORM].get(replacement),
                "screened": times[SCREENED].get(replacement),
                "sensitivity": times[FINAL].get(replacement),
            }
        )
    return students
