"""LoRAs of the tiny teachers with random weights, written by PEFT and diffusers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ppcl.models.teacher import Teacher

PIPELINES = {"qwen": QwenImagePipeline, "flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}
# Layers of attention, FFNs, modulations, and outside of blocks.
TARGETS = {
    "qwen": [
        "to_q",
        "to_k",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "img_mod.1",
        "proj_out",
    ],
    "flux": ["to_q", "to_k", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2", "norm1.linear", "x_embedder"],
    "sd3": [
        "to_q",
        "to_k",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "norm1.linear",
        "context_embedder",
    ],
}


def written(family: str, teacher: Teacher, folder: Path, seed: int = 0, alpha: int = 8, **config: Any) -> Path:
    """A LoRA of rank 4 in diffusers' format, whose strength is `alpha / 4`."""
    transformer = teacher.transformer()
    targets = config.pop("target_modules", TARGETS[family])
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(transformer)
    state = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    metadata = {"transformer": transformer.peft_config["default"].to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    PIPELINES[family].save_lora_weights(
        folder,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=metadata["transformer"],
    )
    return folder / "pytorch_lora_weights.safetensors"


def changed(path: Path, to: Path, change: Any) -> Path:
    """A copy of a file with its tensors changed."""
    save_file(change(load_file(path)), to)
    return to
