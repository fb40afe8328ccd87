"""A load from AIPerf, a third-party load generator for the Images API: streams with previews, and clients that leave.

    python benchmarks/aiperf.py runs/demo

Sets AIPerf up in a virtual environment of its own, serves the result on this machine, and fails unless every request
was drawn or was cancelled by its client, nothing is left under way afterwards, and the server's count is AIPerf's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.demo.world import captions
from ppcl.result import Result

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.13.0"
_PATIENCE = 300.0


def installed(folder: Path) -> Path:
    """Return AIPerf's command, in a virtual environment of its own: it needs other versions of our dependencies."""
    command = folder / "bin" / "aiperf"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", f"aiperf=={VERSION}"], check=True)
    return command


@contextmanager
def served(result: Path, port: int, settings: list[str]) -> Iterator[str]:
    """The address at which the result is served, for the length of a `with` block."""
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jobs.cli.main", "serve", str(result), "--port", str(port)]
    for one in settings:
        command += ["--set", one]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PPCL_API_KEYS", None)
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def counted(address: str) -> dict[str, float]:
    """The server's metrics, by series."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {
        series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if line and line[0] != "#")
    }


def under_way(figures: dict[str, float]) -> float:
    return figures["ppcl_pictures_queued"] + figures["ppcl_pictures_running"]


def load(
    aiperf: Path, address: str, result: Result, options: argparse.Namespace, more: list[str], folder: Path
) -> list[dict]:
    """AIPerf's record of every request."""
    prompts = folder / "prompts.jsonl"
    every = captions()[:: max(1, len(captions()) // options.requests)]
    prompts.write_text("".join(json.dumps({"text": caption.text}) + "\n" for caption in every))
    sampling = result.sampling
    inputs = {
        "size": f"{sampling.width}x{sampling.height}",
        "num_inference_steps": options.steps or sampling.steps,
        "partial_images": 2,
    }
    command = [
        aiperf,
        "profile",
        "--model",
        options.variant,
        "--url",
        address,
        "--endpoint-type",
        "image_generation",
        "--streaming",
        "--tokenizer",
        result.teacher.folder.absolute() / "tokenizer",
        "--input-file",
        prompts,
        "--custom-dataset-type",
        "single_turn",
        "--concurrency",
        str(options.concurrency),
        "--request-count",
        str(options.requests),
        "--random-seed",
        "1",
        "--ui",
        "none",
        "--no-gpu-telemetry",
        "--no-server-metrics",
        "--workers-max",
        "1",
        "--record-processors",
        "1",
        "--artifact-dir",
        folder / "artifacts",
        *more,
    ]
    for name, value in inputs.items():
        command += ["--extra-inputs", f"{name}:{value}"]
    # Its own tokenizer is a local folder; a hub that is switched off would make it look there all the same.
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    run = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"AIPerf failed:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return [json.loads(line) for line in (folder / "artifacts" / "profile_export.jsonl").read_text().splitlines()]


def measured(aiperf: Path, address: str, result: Result, options: argparse.Namespace, more: list[str]) -> dict:
    before = counted(address)
    with tempfile.TemporaryDirectory() as folder:
        records = load(aiperf, address, result, options, more, Path(folder))
    end = time.monotonic() + _PATIENCE
    while under_way(after := counted(address)) and time.monotonic() < end:
        time.sleep(0.2)

    def added(series: str) -> int:
        return int(after.get(series, 0) - before.get(series, 0))

    seconds = sorted(one["metrics"]["request_latency"]["value"] / 1000 for one in records if not one.get("error"))
    return {
        "requests": len(records),
        "drawn": len(seconds),
        "cancelled": sum(bool(one["metadata"]["was_cancelled"]) for one in records),
        "median_seconds": seconds[len(seconds) // 2] if seconds else None,
        "slowest_seconds": seconds[-1] if seconds else None,
        "server_drawn": added('ppcl_requests_total{outcome="done"}'),
        "server_cancelled": added('ppcl_requests_total{outcome="cancelled"}'),
        "left": int(under_way(after)),
    }


def wrong(row: dict) -> list[str]:
    """What must not be. A client may go away before its request is there or just after its picture is."""
    found = []
    if row["drawn"] + row["cancelled"] != row["requests"]:
        found.append(f"{row['requests'] - row['drawn'] - row['cancelled']} requests failed")
    if row["left"]:
        found.append(f"{row['left']} pictures are still under way")
    if not row["drawn"] <= row["server_drawn"] <= row["requests"] or row["server_cancelled"] > row["cancelled"]:
        found.append(f"the server counts {row['server_drawn']} drawn and {row['server_cancelled']} cancelled")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="folder written by ppcl compress")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--steps", type=int, help="denoising steps; default: the result's")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ppcl serve")
    parser.add_argument(
        "--environment", type=Path, default=ROOT / "build" / "aiperf", help="where AIPerf is, or is put"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    result, aiperf = Result(options.result), installed(options.environment)
    loads = {
        "streaming": [],
        "streaming, 40 % go away": ["--request-cancellation-rate", "40", "--request-cancellation-delay", "0.1"],
    }
    with served(options.result, options.port, options.set) as address:
        rows = {name: measured(aiperf, address, result, options, more) for name, more in loads.items()}
    table = Table("load", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"aiperf": VERSION, "concurrency": options.concurrency, "loads": rows}, indent=1) + "\n"
        )
    if problems := [f"{name}: {problem}" for name, row in rows.items() for problem in wrong(row)]:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
