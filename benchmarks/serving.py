"""Serving against stock diffusers on the same cores, and elastic quality against fixed and random choices under load.

    python benchmarks/serving.py runs/demo --json benchmarks/results/serving.json

- `overhead`: one request over HTTP (`ppcl serve`, OpenAI's client) and the stock pipeline's same call, alternating.
- `throughput`: eight clients at once over HTTP against the stock pipeline, one picture after the other.
- `elastic`: requests at random times, at shares of the capacity of the largest variant, each with a deadline. Effective
  quality is the mean score of the images that were in time, by the result's evaluation, times their share of all
  requests. All policies see the same arrival times and the same refusals. Every seed has other times; the intervals
  are 95 % ones over seeds, of the difference from `elastic` at the same times.
- `switch`: from one variant to another.
- `start`: a fresh process until its first picture: the engine alone, and the command `ppcl serve`.

With `--json`, parts and seeds that are run one after the other end in one file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openai
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from ppcl.result import Result
from serve.config import load_settings
from serve.engine.engine import Engine
from serve.protocol import AUTO, FinalImage, GenerationRequest, Refused

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a photo of a red circle",
    "a photo of two blue squares",
    "a photo of a green cross left of a black triangle",
    "a photo of a yellow square",
)
PATIENCE = 300.0
out = Console(width=120)


@contextmanager
def served(options: argparse.Namespace, port: int) -> Iterator[openai.OpenAI]:
    """`ppcl serve` in a process of its own, ready."""
    command = [
        sys.executable,
        "-m",
        "jobs.cli.main",
        "serve",
        str(options.result),
        "--port",
        str(port),
        "--set",
        f"engine.cpus={options.threads}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("ppcl serve did not start") from None
                time.sleep(0.05)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def over_http(client: openai.OpenAI, seed: int) -> None:
    client.images.generate(prompt=PROMPTS[seed % len(PROMPTS)], model="teacher", extra_body={"seed": seed})


def stock(result: Result) -> Callable[[int], None]:
    """The stock pipeline as the job called it."""
    pipeline, sampling = result.pipeline("teacher"), result.sampling

    def call(seed: int) -> None:
        pipeline(
            PROMPTS[seed % len(PROMPTS)],
            num_inference_steps=sampling.steps,
            height=sampling.height,
            width=sampling.width,
            generator=torch.Generator().manual_seed(seed),
            **sampling.arguments,
        )

    return call


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def overhead(options: argparse.Namespace, client: openai.OpenAI) -> dict[str, Any]:
    direct, seconds = stock(Result(options.result)), {"direct": [], "http": []}
    for seed in range(options.rounds + 1):
        # The first of each warms up.
        for name, call in (("direct", lambda: direct(seed)), ("http", lambda: over_http(client, seed))):  # noqa: B023
            seconds[name].append(timed(call))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": medians["http"] / medians["direct"], "rounds": options.rounds}


def throughput(options: argparse.Namespace, client: openai.OpenAI) -> dict[str, Any]:
    direct, count = stock(Result(options.result)), options.rounds * 8
    direct(0)
    serial, together = [], []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: over_http(client, seed), range(8)))
        # In turns, so that a drift of the machine's speed falls on both alike.
        for _ in range(2):
            serial.append(timed(lambda: [direct(seed) for seed in range(options.rounds)]) / options.rounds)
            together.append(timed(lambda: list(pool.map(lambda seed: over_http(client, seed), range(count)))) / count)
    each = {"stock_serial": statistics.mean(serial), "http_concurrency_8": statistics.mean(together)}
    return {
        "seconds_per_picture": each,
        "ratio": each["stock_serial"] / each["http_concurrency_8"],
        "pictures": 2 * count,
    }


def engine_of(options: argparse.Namespace, variants: list[str] | None) -> Engine:
    more = [] if variants is None else [f"engine.variants=[{','.join(variants)}]"]
    return Engine(load_settings(options.result, None, [f"engine.queue={options.queue}", *more]))


def request(engine: Engine, seed: int, model: str, deadline: float | None = None) -> GenerationRequest:
    info = engine.info
    return GenerationRequest(
        str(seed), PROMPTS[seed % len(PROMPTS)], model, 1, info.height, info.width, info.steps, seed, deadline=deadline
    )


async def drawn(engine: Engine, wanted: GenerationRequest) -> tuple[str | None, float]:
    """The variant, None where it was refused, and the seconds until its picture."""
    began, variant = time.perf_counter(), None
    try:
        async for event in engine.generate(wanted):
            variant = getattr(event, "variant", variant)
            assert variant is not None or not isinstance(event, FinalImage)
    except Refused:
        return None, time.perf_counter() - began
    return variant, time.perf_counter() - began


async def capacity(engine: Engine, model: str, count: int) -> tuple[float, float]:
    """Pictures a second with the batches full, and the seconds of one picture alone."""
    alone = statistics.median([(await drawn(engine, request(engine, seed, model)))[1] for seed in range(3)])
    seeds, began = iter(range(count)), time.perf_counter()

    async def client() -> None:
        for seed in seeds:
            await drawn(engine, request(engine, seed, model))

    await asyncio.gather(*(client() for _ in range(2 * engine.settings.engine.batch)))
    return count / (time.perf_counter() - began), alone


async def one_load(
    engine: Engine, choose: Callable[[int], str], arrivals: list[float], deadline: float, scores: dict[str, float]
) -> dict[str, Any]:
    """What a policy, a choice of the model for each request, makes of requests at these times."""
    began = time.perf_counter()

    async def arrive(seed: int, at: float) -> tuple[str | None, float]:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        return await drawn(engine, request(engine, seed, choose(seed), deadline))

    told = await asyncio.gather(*(arrive(seed, at) for seed, at in enumerate(arrivals)))
    in_time = [variant for variant, seconds in told if variant is not None and seconds <= deadline]
    return {
        "effective_quality": sum(scores[variant] for variant in in_time) / len(told),
        "in_time": len(in_time) / len(told),
        "refused": sum(variant is None for variant, _ in told) / len(told),
        "late": sum(variant is not None and seconds > deadline for variant, seconds in told) / len(told),
        "mean_score": statistics.mean(scores[variant] for variant in in_time) if in_time else None,
        "variants": dict(Counter(variant or "refused" for variant, _ in told)),
    }


async def elastic(options: argparse.Namespace, variants: list[str] | None) -> list[dict[str, Any]]:
    """One entry for each seed and deadline."""
    engine = engine_of(options, variants)
    scores = {info.id: info.quality for info in await engine.models()}
    if None in scores.values():
        raise SystemExit(f"{options.result} has no evaluation to take scores from; run ppcl compress to its end")
    steps = engine.quality.levels
    policies: dict[str, Callable[[int], str]] = {
        "elastic": lambda number: AUTO,
        "always large": lambda number: steps[0],
        "always small": lambda number: steps[-1],
        "random": lambda number: random.Random(number).choice(steps),
    }
    runs = []
    for times, seed in ((times, seed) for times in options.deadlines for seed in options.seeds):
        pictures_a_second, alone = await capacity(engine, steps[0], 8 * options.rounds)
        deadline, draw, rows = times * alone, random.Random(seed), []
        for load in options.loads:
            arrivals, at = [], 0.0
            while (at := at + draw.expovariate(load * pictures_a_second)) < options.seconds:
                arrivals.append(at)
            # Another one first at every seed, so that none always follows the same.
            for name in draw.sample(list(policies), len(policies)):
                row = await one_load(engine, policies[name], arrivals, deadline, scores)
                rows.append({"load": load, "policy": name, "requests": len(arrivals), **row})
                out.print(
                    f"seed {seed}, load {load:g}, {name}: {row['effective_quality']:.3f}, "
                    f"{row['in_time']:.1%} in time, {row['variants']}"
                )
        runs.append(
            {
                "seed": seed,
                "deadline_times": times,
                "ladder": steps,
                "scores": scores,
                "pictures_a_second": pictures_a_second,
                "seconds_alone": alone,
                "deadline": deadline,
                "seconds": options.seconds,
                "rows": rows,
                "step_seconds": {
                    name: vars(engine.cost_model.profiles[variant.plan])
                    for name, variant in engine.weights.variants.items()
                },
            }
        )
    engine.close()
    return runs


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs that differ in their seed: for each load and policy the means, and how far elastic is above it."""
    rows = []
    for load, policy in dict.fromkeys(
        (row["load"], row["policy"])
        for run in runs
        for row in sorted(run["rows"], key=lambda row: row["policy"] != "elastic")
    ):
        of = {
            name: [row for run in runs for row in run["rows"] if (row["load"], row["policy"]) == (load, name)]
            for name in (policy, "elastic")
        }
        above = [
            ours["effective_quality"] - theirs["effective_quality"]
            for ours, theirs in zip(of["elastic"], of[policy], strict=True)
        ]
        means = {
            key: statistics.mean(row[key] for row in of[policy])
            for key in ("effective_quality", "in_time", "refused", "late")
        }
        rows.append({"load": load, "policy": policy, "seeds": len(above), **means, "elastic_above": _interval(above)})
    return sorted(rows, key=lambda row: row["load"])


def _interval(values: list[float]) -> dict[str, float | None]:
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def switch(options: argparse.Namespace) -> dict[str, Any]:
    engine = engine_of(options, None)
    plans, plug = [variant.plan for variant in engine.weights.variants.values()], engine.generator.shared.activate
    taken = [timed(lambda: plug(plans[turn % len(plans)])) * 1e6 for turn in range(200 * len(plans))]  # noqa: B023
    engine.close()
    return {
        "microseconds": {"median": statistics.median(taken), "p99": statistics.quantiles(taken, n=100)[98]},
        "blocks": engine.weights.result.catalog.blocks,
    }


_FIRST = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from serve.config import load_settings
from serve.engine.engine import Engine
from serve.protocol import GenerationRequest
engine = Engine(load_settings(Path(sys.argv[1])))
async def first():
    info = engine.info
    size = info.height, info.width
    request = GenerationRequest("1", "a photo of a red circle", "teacher", 1, *size, info.steps, 0)
    return [event async for event in engine.generate(request)]
asyncio.run(first())
engine.close()
"""


def start(options: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-c", _FIRST, str(options.result), str(ROOT)]
    engine = [
        timed(lambda: subprocess.run(command, env=environment, check=True, capture_output=True))
        for _ in range(options.starts)
    ]
    whole = []
    for _ in range(options.starts):
        began = time.perf_counter()
        with served(options, free_port()) as client:
            over_http(client, 0)
            whole.append(time.perf_counter() - began)
    return {
        "engine_seconds": statistics.median(engine),
        "command_seconds": statistics.median(whole),
        "starts": options.starts,
    }


def table(found: dict[str, Any]) -> None:
    for name in ("overhead", "throughput"):
        if name in found:
            out.print(f"{name}: ratio {found[name]['ratio']:.3f}, {found[name]}")
    for name in ("switch", "start"):
        if name in found:
            out.print(f"{name}: {found[name]}")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in found.get("elastic", []):
        groups.setdefault((*run["ladder"], run["deadline_times"]), []).append(run)
    for (*ladder, times), runs in groups.items():
        rows = Table(title=f"auto over {', '.join(ladder)}; deadline {times:g} times a picture alone")
        for heading in ("load", "policy", "effective quality", "in time", "refused", "late", "elastic above it"):
            rows.add_column(heading)
        for row in compared(runs):
            above = row["elastic_above"]
            between = "" if above["low"] is None else f" ({above['low']:+.3f} to {above['high']:+.3f})"
            shares = (f"{row[key]:.1%}" for key in ("in_time", "refused", "late"))
            shown = "" if row["policy"] == "elastic" else f"{above['mean']:+.3f}{between}"
            rows.add_row(f"{row['load']:g}", row["policy"], f"{row['effective_quality']:.3f}", *shares, shown)
        out.print(rows)


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Parts measured before, and those measured now in the place of the same ones."""

    def same(run: dict[str, Any]) -> tuple:
        return tuple(run["scores"]), run["deadline_times"], run["seed"]

    now = {same(run) for run in found.get("elastic", [])}
    runs = [run for run in before.get("elastic", []) if same(run) not in now] + found.get("elastic", [])
    return before | found | ({"elastic": runs} if runs else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="folder of a finished job with an evaluation")
    parser.add_argument("--parts", default="overhead,throughput,elastic,switch,start")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="cores of the engine and of the stock pipeline"
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="pictures of the overhead, and a client of the throughput"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, for each seed, load and policy")
    parser.add_argument("--loads", default="0.5,1,1.5,2", help="shares of the largest variant's capacity")
    parser.add_argument(
        "--deadlines", default="4", help="of every request, times the seconds of a picture alone; several by commas"
    )
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument(
        "--sets",
        default="",
        help="variants served, separated by commas; several sets by semicolons; an empty one is all",
    )
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--seeds", default="0,1,2", help="of the times of arrival")
    parser.add_argument("--json", type=Path, help="write the figures there, beside those of other parts and seeds")
    options = parser.parse_args()
    options.loads = [float(load) for load in options.loads.split(",")]
    options.deadlines = [float(times) for times in options.deadlines.split(",")]
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.result = options.result.absolute()
    torch.set_num_threads(options.threads)
    parts = options.parts.split(",")
    found: dict[str, Any] = {"result": options.result.name, "threads": options.threads}
    if {"overhead", "throughput"} & set(parts):
        with served(options, free_port()) as client:
            for name, measure in (("overhead", overhead), ("throughput", throughput)):
                if name in parts:
                    found[name] = measure(options, client)
    if "elastic" in parts:
        sets = [[name for name in text.split(",") if name] or None for text in options.sets.split(";")]
        found["elastic"] = [run for variants in sets for run in asyncio.run(elastic(options, variants))]
    if "switch" in parts:
        found["switch"] = switch(options)
    if "start" in parts:
        found["start"] = start(options)
    if options.json:
        if options.json.exists():
            found = joined(json.loads(options.json.read_text()), found)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    table(found)


if __name__ == "__main__":
    main()
