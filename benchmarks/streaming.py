"""Calibration: peak memory by the number of prompts. What streams holds as much for 100,000 prompts as for 100.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json
    python benchmarks/streaming.py --demo --pipelines stage plain --repeats 3

The whole stage as a job runs it, on an embedded Ray: prompts are cut, encoded by one pool of actors, sampled by
another, written, split. `--pipelines plain` runs `plain_ray_data.py` instead, to compare with. `--demo` takes the
teacher, the prompts and the settings of `demo/demo.yaml`. Without it the teacher is a tiny random Qwen-Image (images
of 32 × 32, two steps of sampling, one state a prompt), so that 100,000 prompts take minutes: what a batch of a large
teacher holds is not in these figures, and does not depend on the number of prompts either. Batches have the same size
whatever their number.

Every process is read five times a second: its proportional share of anonymous memory (Pss_Anon), and of shared memory
(Pss_Shmem), which of all processes together is the object store. Pages of program files are left out: they are shared
by however many processes there are just then. Each number is the peak of its own kind over the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KINDS = ("driver", "workers", "Ray's own", "object store")
EVERY = 0.2


def _children() -> dict[int, list[int]]:
    found = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        found[int(text.rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    return found


def memory(driver: int) -> dict[str, float]:
    """MB by kind, of a driver and everything it started."""
    children, found, open_ = _children(), dict.fromkeys(KINDS, 0.0), [driver]
    while open_:
        process = open_.pop()
        open_ += children[process]
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            name = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        own = {key: int(value.split()[0]) / 1e3 for key, value in (line.split(":", 1) for line in lines)}
        if "Pss_Anon" not in own:
            continue
        kind = "driver" if process == driver else "workers" if name.startswith(b"ray::") else "Ray's own"
        found[kind] += own["Pss_Anon"]
        found["object store"] += own["Pss_Shmem"]
    return found


def _tiny_config(folder: Path, teacher: Path, count: int, batch: int) -> Any:
    from ppcl.config.schema import Calibration, Config, Sampling

    lines = (ROOT / "demo" / "prompts.txt").read_text().splitlines()
    with open(folder / "prompts.txt", "w") as file:
        for number in range(count):
            file.write(f"{lines[number % len(lines)]} {number}\n")
    return Config(
        teacher=teacher,
        prompts=folder / "prompts.txt",
        output=folder / "out",
        device="cpu",
        sampling=Sampling(steps=2, height=32, width=32),
        calibration=Calibration(states_per_prompt=1, batch_size=batch),
    )


def _demo_config(folder: Path) -> Any:
    from ppcl.config.schema import Config

    demo = ROOT / "demo"
    values = yaml.safe_load((demo / "demo.yaml").read_text())
    places = {"teacher": demo / values["teacher"], "prompts": demo / values["prompts"], "output": folder / "out"}
    return Config(**values | places | {"device": "cpu"})


def _run_stage(config: Any, folder: Path) -> int:
    from jobs.stage import JobIdentity, StageContext
    from jobs.stages import calibration
    from ppcl.models.teacher import Teacher

    teacher, output = Teacher(config.teacher), folder / "calibration"
    output.mkdir(parents=True)
    identity = JobIdentity.of(config, teacher)
    told = calibration.run(StageContext(config, teacher, identity, {}, output, "cpu", lambda done, total: None))
    return told["prompts"]


def _run_plain(config: Any, folder: Path) -> int:
    from benchmarks.plain_ray_data import calibrate

    return calibrate(config, folder / "calibration")


def _calibrate(pipeline: str, config: Any, folder: Path, answers: Any) -> None:
    """One calibration, in a process of its own, which watches itself."""
    import diffusers

    from jobs.runtime.cluster import connected

    diffusers.logging.disable_progress_bar()
    run = {"stage": _run_stage, "plain": _run_plain}[pipeline]
    peaks, course, ended = dict.fromkeys(KINDS, 0.0), [], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            now = memory(os.getpid())
            for kind in KINDS:
                peaks[kind] = max(peaks[kind], now[kind])
            peaks["together"] = max(peaks.get("together", 0.0), sum(now.values()))
            course.append([round(time.monotonic() - begun, 1), *(round(now[kind], 1) for kind in KINDS)])

    begun = time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with connected(None, config):
        count = run(config, folder)
    seconds = time.monotonic() - begun
    ended.set()
    watcher.join()
    before = memory(os.getpid())["driver"]
    states = folder / "calibration" / "states"
    from ppcl.calibration.dataset import _Rows

    samples = _Rows(states, list(states.glob("*.parquet")), "sample_id")
    index = memory(os.getpid())["driver"] - before
    made = len(samples.ids)
    per_prompt = config.calibration.states_per_prompt
    if made != count * per_prompt or len(set(samples.ids)) != made:
        raise AssertionError(f"{count} prompts gave {made} samples instead of {per_prompt} each")
    course = course[:: max(1, len(course) // 100)]
    answers.put(
        {
            "pipeline": pipeline,
            "prompts": count,
            "seconds": seconds,
            "peak_mb": peaks,
            "index_mb": index,
            "files": len(list(states.glob("*.parquet"))),
            "course": course,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[100, 100_000], help="the first is what others are compared to"
    )
    parser.add_argument("--batch", type=int, default=50, help="prompts a batch")
    parser.add_argument("--demo", action="store_true", help="the demo's calibration instead")
    parser.add_argument("--pipelines", nargs="+", choices=("stage", "plain"), default=["stage"])
    parser.add_argument("--repeats", type=int, default=1, help="of all, in turns")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    from tests import tiny

    rows = []
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        teacher = None if options.demo else tiny.qwen_pipeline(Path(folder) / "teacher", blocks=2)
        counts = [None] if options.demo else options.prompts
        for _, count, pipeline in product(range(options.repeats), counts, options.pipelines):
            place = Path(folder) / "run"
            place.mkdir()
            config = _demo_config(place) if options.demo else _tiny_config(place, teacher, count, options.batch)
            answers = context.SimpleQueue()
            process = context.Process(target=_calibrate, args=(pipeline, config, place / "out", answers))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"the calibration of {count} prompts ended with {process.exitcode}")
            rows.append(answers.get())
            shutil.rmtree(place)
    table = Table(title="Peak memory of calibration, MB")
    for heading in ("pipeline", "prompts", "seconds", *KINDS, "together", "times the first", "index of the samples"):
        table.add_column(heading, justify="right")
    for row in rows:
        row["times_first"] = {
            kind: row["peak_mb"][kind] / rows[0]["peak_mb"][kind]
            for kind in row["peak_mb"]
            if rows[0]["peak_mb"][kind] > 1
        }
        peaks = [f"{row['peak_mb'][kind]:.0f}" for kind in (*KINDS, "together")]
        table.add_row(
            row["pipeline"],
            f"{row['prompts']:,}",
            f"{row['seconds']:.0f}",
            *peaks,
            f"{row['times_first']['together']:.3f}",
            f"{row['index_mb']:.1f}",
        )
    Console(width=130).print(table)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"settings": settings, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
