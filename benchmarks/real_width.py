"""A whole job at the width of Qwen-Image: d 3072, 24 heads, 12,288 hidden units, text width 3584, and few blocks.

    python benchmarks/real_width.py --blocks 3
    python benchmarks/real_width.py --on-gpu        # on a GPU of 80 GB: step times with 60 blocks

The first runs `ppcl compress` with the default configuration on random weights in sharded bfloat16 safetensors, on
images of 256 × 256 and few samples and steps, since a CPU is slow. It compares the most memory of each kind of worker
with what `ppcl plan` computes, and says by the same formulas what the stage needs with 60 blocks. A process counts
without what it shares with others and without what an idle one takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.config.schema import Config, load_config
from ppcl.sizing import Device
from ppcl.sizing.job import JobSize, WorkerSize, job_size
from ppcl.sizing.model import TeacherSize, published
from ppcl.sizing.stages import worker_sizes
from ppcl.sizing.table import duration, gigabytes

SIZE = 256
# How a process of each kind of worker calls itself.
PROCESSES = {
    "encoder": "MapWorker",
    "sampler": "MapWorker",
    "rank": "RayTrainWorker",
    "task": "ppcl",
    "evaluator": "_Evaluator",
    "coordinator": "ppcl",
}
# Bytes of a worker's process that has imported all and holds no model.
IDLE = 0.45e9


def make_teacher(folder: Path, blocks: int) -> None:
    """A pipeline with Qwen-Image's own widths: random weights, a small text encoder and a small VAE."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    from ppcl.demo import text

    config = published()["qwen-image"]["config"] | {"num_layers": blocks}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = QwenImageTransformer2DModel(**config)
    finally:
        torch.set_default_dtype(before)
    tokenizer = text.new_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=config["out_channels"],
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text.new_text_encoder(len(tokenizer), 0, config["joint_attention_dim"]),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, max_shard_size="2GB")


def configuration(folder: Path, options: argparse.Namespace) -> Path:
    """The default configuration but for the numbers of samples and steps, and the device."""
    (folder / "prompts.txt").write_text("".join(f"a photo of a {n} circle\n" for n in range(options.prompts)))
    job = f"""\
teacher: teacher
prompts: prompts.txt
output: {folder / "out"}
device: cpu
sampling: {{height: {SIZE}, width: {SIZE}, steps: {options.sampling_steps}}}
calibration: {{batch_size: 4}}
probes: {{batch_size: 8}}
detection: {{screening_steps: {options.steps}, max_candidates: 1}}
distillation: {{steps: {options.steps}, warmup: 1, batch_size: 4, moments_gb: 3}}
finetuning: {{steps: {options.steps}, warmup: 1, batch_size: 2, measured_plans: 2, plan: p70}}
variants: {{budgets: [0.9, 0.7]}}
evaluation: {{max_prompts: 2, batch_size: 2}}
"""
    path = folder / "job.yaml"
    path.write_text(job)
    return path


class ProcessWatch(threading.Thread):
    """The most bytes that a process of each name held for itself, in each stage."""

    def __init__(self, root: int, events: Path):
        super().__init__(daemon=True)
        self.root, self.events = psutil.Process(root), events
        self.most: dict[tuple[str, str], int] = defaultdict(int)
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.wait(1.0):
            stage = self._stage()
            for process in self._processes():
                try:
                    name, own = " ".join(process.cmdline()), process.memory_full_info().uss
                except psutil.Error:
                    continue
                self.most[stage, name] = max(self.most[stage, name], own)

    def _processes(self) -> list[psutil.Process]:
        # Ray's workers are no children of the command.
        try:
            return [self.root, *(p for p in psutil.process_iter() if "ray::" in " ".join(p.cmdline()[:1]))]
        except psutil.Error:
            return [self.root]

    def _stage(self) -> str:
        if not self.events.exists():
            return ""
        started = [e for e in map(json.loads, self.events.read_text().splitlines()) if e["kind"] == "stage_started"]
        return started[-1]["stage"] if started else ""

    def of(self, worker: WorkerSize) -> int | None:
        """The most that a process of this kind of worker held, beside what an idle one takes."""
        sizes = [
            own
            for (stage, name), own in self.most.items()
            if stage == worker.stage and PROCESSES[worker.worker] in name
        ]
        return round(max(sizes) - IDLE) if sizes else None


def sizes_of(config: Config, teacher: TeacherSize, prompts: int) -> JobSize:
    return job_size(config, teacher, prompts, 2, Device(), cpu=True)


def run_job(options: argparse.Namespace) -> dict[str, Any]:
    out = Console(width=150)
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        started = time.monotonic()
        make_teacher(folder / "teacher", options.blocks)
        out.print(f"made {options.blocks} blocks in {time.monotonic() - started:.0f} s")
        path = configuration(folder, options)
        command = [sys.executable, "-m", "ppcl.command", "compress", str(path), *options.more]
        job = subprocess.Popen(command)
        watch = ProcessWatch(job.pid, folder / "out" / "events.jsonl")
        watch.start()
        code = job.wait()
        watch.ending.set()
        watch.join()
        seconds = json.loads((folder / "out" / "manifest.json").read_text())["stages"] if code == 0 else {}
        config = load_config(path)
        from ppcl.models.teacher import Teacher

        small = TeacherSize.of(Teacher(folder / "teacher"), SIZE, SIZE, torch.float32)
        planned = worker_sizes(sizes_of(config, small, options.prompts))
    large = TeacherSize.named("qwen-image", SIZE, SIZE, torch.float32)
    whole = {(w.stage, w.worker): w for w in worker_sizes(sizes_of(config, large, options.prompts))}
    rows = []
    for worker in planned:
        rows.append(
            {
                "stage": worker.stage,
                "worker": worker.worker,
                "planned": worker.device_bytes + worker.host_bytes,
                "measured": watch.of(worker),
                "seconds": seconds.get(worker.stage, {}).get("seconds"),
                "planned_60": whole[worker.stage, worker.worker].device_bytes,
            }
        )
    table = Table(title=f"{options.blocks} blocks of Qwen-Image's width, {SIZE} × {SIZE}, float32 on a CPU")
    for name in ("stage", "worker", "planned", "measured", "of planned", "stage, time", "planned, 60 blocks"):
        table.add_column(name, justify="left" if name in ("stage", "worker") else "right")
    for row in rows:
        measured = row["measured"]
        table.add_row(
            row["stage"],
            row["worker"],
            gigabytes(row["planned"]),
            "–" if measured is None else gigabytes(measured),
            "–" if not measured or not row["planned"] else f"{100 * measured / row['planned']:.0f} %",
            duration(row["seconds"]),
            gigabytes(row["planned_60"]),
        )
    out.print(table)
    return {"blocks": options.blocks, "exit_code": code, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=None, help="default: 3; with --on-gpu 60")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--sampling-steps", type=int, default=4)
    parser.add_argument("--folder", default=None, help="where the teacher and the result are made for the time")
    parser.add_argument("--steps", type=int, default=2, help="training steps of the job")
    parser.add_argument("--on-gpu", action="store_true", help="time steps on a GPU instead of running a job")
    parser.add_argument("--out", default="benchmarks/results/real_width.json")
    parser.add_argument("more", nargs="*", help="further options of ppcl compress, after --")
    options = parser.parse_args()
    if options.on_gpu:
        from benchmarks.real_width_steps import time_steps

        result = time_steps(options.blocks or 60)
    else:
        options.blocks = options.blocks or 3
        result = run_job(options)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
