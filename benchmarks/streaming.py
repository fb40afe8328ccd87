"""Calibration: peak memory by the number of prompts. What streams holds as much for 100,000 prompts as for 100.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json

The whole stage as a job runs it, on an embedded Ray: prompts are cut, encoded by one pool of actors, sampled by
another, written, split. The teacher is a tiny random Qwen-Image (images of 32 × 32, two steps of sampling, one state a
prompt), so that 100,000 prompts take minutes: what a batch of a large teacher holds is not in these figures, and does
not depend on the number of prompts either. Batches have the same size whatever their number.

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
from pathlib import Path
from typing import Any

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


def _calibrate(folder: Path, teacher: Path, count: int, batch: int, answers: Any) -> None:
    """One calibration, in a process of its own, which watches itself."""
    import diffusers

    from jobs.runtime.cluster import connected
    from jobs.stage import JobIdentity, StageContext
    from jobs.stages import calibration
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.config.schema import Calibration, Config, Sampling
    from ppcl.models.teacher import Teacher

    diffusers.logging.disable_progress_bar()
    lines = (ROOT / "demo" / "prompts.txt").read_text().splitlines()
    folder.mkdir()
    with open(folder / "prompts.txt", "w") as file:
        for number in range(count):
            file.write(f"{lines[number % len(lines)]} {number}\n")
    config = Config(
        teacher=teacher,
        prompts=folder / "prompts.txt",
        output=folder / "out",
        device="cpu",
        sampling=Sampling(steps=2, height=32, width=32),
        calibration=Calibration(states_per_prompt=1, batch_size=batch),
    )
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
        opened_teacher, output = Teacher(teacher), folder / "out" / "calibration"
        output.mkdir(parents=True)
        identity = JobIdentity.of(config, opened_teacher)
        told = calibration.run(
            StageContext(config, opened_teacher, identity, {}, output, "cpu", lambda done, total: None)
        )
    seconds = time.monotonic() - begun
    ended.set()
    watcher.join()
    before = memory(os.getpid())["driver"]
    opened = CalibrationSet(folder / "out" / "calibration")
    samples = len(opened.ids(held_out=False))
    index = memory(os.getpid())["driver"] - before
    if told["prompts"] != count or samples + told["held_out_prompts"] != count:
        raise AssertionError(f"{count} prompts gave {told}, {samples} samples to train on")
    course = course[:: max(1, len(course) // 100)]
    answers.put({"prompts": count, "seconds": seconds, "peak_mb": peaks, "index_mb": index, "course": course})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[100, 100_000], help="the first is what others are compared to"
    )
    parser.add_argument("--batch", type=int, default=50, help="prompts a batch")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    from tests import tiny

    rows = []
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        teacher = tiny.qwen_pipeline(Path(folder) / "teacher", blocks=2)
        for count in options.prompts:
            answers, place = context.SimpleQueue(), Path(folder) / str(count)
            process = context.Process(target=_calibrate, args=(place, teacher, count, options.batch, answers))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"the calibration of {count} prompts ended with {process.exitcode}")
            rows.append(answers.get())
            shutil.rmtree(place)
    table = Table(title=f"Peak memory of calibration, MB, batches of {options.batch} prompts")
    for heading in ("prompts", "seconds", *KINDS, "together", "times the first", "index of the samples"):
        table.add_column(heading, justify="right")
    for row in rows:
        row["times_first"] = {
            kind: row["peak_mb"][kind] / rows[0]["peak_mb"][kind]
            for kind in row["peak_mb"]
            if rows[0]["peak_mb"][kind] > 1
        }
        peaks = [f"{row['peak_mb'][kind]:.0f}" for kind in (*KINDS, "together")]
        table.add_row(
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
