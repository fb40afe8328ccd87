"""Store the transformer of a pipeline folder in bfloat16, in half of the bytes. It is still computed with in float32.

    python -m ppcl.demo.store_bfloat16 demo/teacher

Rounding the weights changes the teacher a little: `python -m ppcl.demo.score_teacher` says by how much.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ppcl.storage.atomic import replacing


def store_bfloat16(folder: Path) -> None:
    """Replace the transformer's one safetensors file by the same tensors in bfloat16, and keep its metadata."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rounded = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in tensors.items()}
    with replacing(path) as partial:
        save_file(rounded, partial, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the pipeline's folder")
    store_bfloat16(parser.parse_args().folder)


if __name__ == "__main__":
    main()
