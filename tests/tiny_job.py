"""The method on the tiny teacher from probes to fine-tuning, without Ray and in seconds: did a number change?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppcl.config.schema import Detection, Distillation, Finetuning, Probes, Sampling, Width
from ppcl.detection.fit_probes import fit_probes
from ppcl.models.teacher import Teacher
from ppcl.replacements import parse_replacement
from ppcl.replacements.io import files_in
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import tiny
from tests.detecting import detect
from tests.samples import MemorySamples

# Every number of one replacement in so many random directions: two tensors that differ differ in these.
_PROJECTIONS = 8


def run(folder: Path) -> dict[str, Path]:
    """Probes, detection, distillation and fine-tuning of a 6-block teacher; gives the folders of what they made."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    teacher = Teacher(tiny.qwen_pipeline(folder / "teacher"))
    samples, dims = MemorySamples(48), ParallelDims.join(1, 1)
    made = {name: folder / name for name in ("probes", "students", "finetuning")}
    for path in made.values():
        path.mkdir()
    fit_probes(
        teacher,
        samples,
        Probes(batch_size=8, tokens_per_sample=4),
        RunContext(made["probes"], made["probes"], dims=dims),
        Detection().tokens,
    )
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    found = detect(
        made["probes"],
        block_ranges,
        Detection(method="first_difference"),
        Width(text_similarity=0.5, ffn_keep_percents=[50]),
        _silent,
    )
    plan = [parse_replacement(text) for text in found["plan"]]
    (folder / "plan.json").write_text(json.dumps(found["plan"]))
    settings = Distillation(
        steps=12, batch_size=4, warmup=2, learning_rate=1e-3, student_keep_percent=50, ema=0.9, train="all"
    )
    with torch.enable_grad():
        distil(
            teacher,
            samples,
            plan,
            settings,
            RunContext(made["students"], folder / "checkpoints"),
            1e-4,
        )
        tuning = Finetuning(steps=8, batch_size=4, warmup=2, measured_plans=3, learning_rate=1e-3, plan="any")
        finetune(
            teacher,
            samples,
            DistilledReplacements(files_in(made["students"]), {"none": []}, dict.fromkeys(plan, 0.1)),
            tuning,
            RunContext(made["finetuning"], folder / "finetuning-checkpoints"),
            Sampling(steps=4),
        )
    return made


def fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    """By file of a folder: a sha256 of its tensors, and for machines that round differently their projections."""
    return {path.stem: _of(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def _of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    digest, flat = hashlib.sha256(), []
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        flat.append(tensor.double().reshape(-1))
    numbers = torch.cat(flat)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_PROJECTIONS, len(numbers), generator=generator, dtype=torch.float64)
    return {"sha256": digest.hexdigest(), "projections": (directions @ numbers / numbers.norm()).tolist()}


def arithmetic() -> str:
    """A sha256 of how this machine rounds: the same where the same tensors may be expected bit for bit."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, w = torch.randn(7, 33, 96), torch.randn(96, 96, requires_grad=True)
    y = torch.nn.functional.scaled_dot_product_attention(
        x @ w, x, torch.nn.functional.gelu(x @ w.T, approximate="tanh")
    )
    torch.nn.functional.layer_norm(y, (96,)).square().mean().backward()
    solved = torch.linalg.solve(w.double() @ w.double().T + torch.eye(96), w.double())
    digest = hashlib.sha256(w.grad.numpy().tobytes())
    digest.update(solved.detach().numpy().tobytes())
    return digest.hexdigest()


def _silent(*_: Any, phase: str | None = None) -> None:
    pass


def record() -> dict[str, Any]:
    """What the test compares with."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = run(Path(folder))
        plan = json.loads((Path(folder) / "plan.json").read_text())
        return {
            "arithmetic": arithmetic(),
            "plan": plan,
            "stages": {name: fingerprint(path) for name, path in made.items()},
        }


if __name__ == "__main__":
    (Path(__file__).parent / "data" / "tiny_job.json").write_text(json.dumps(record(), indent=1) + "\n")
