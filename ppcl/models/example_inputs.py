"""Arguments that several families' transformers are called with, in the shapes that their pipelines give them."""

from __future__ import annotations

from typing import Any

import torch


def latents_and_text(config: Any, samples: int, grid: tuple[int, int], text: int, packed: bool) -> dict[str, Any]:
    """`hidden_states`, `timestep` and `encoder_hidden_states`.

    `packed`: latents are tokens `(B, S, C)`, else `(B, C, H, W)` with patches of 2. Floating-point tensors are not set.
    """
    rows, columns = grid
    channels = config.in_channels
    shape = (samples, rows * columns, channels) if packed else (samples, channels, 2 * rows, 2 * columns)
    return {
        "hidden_states": torch.empty(shape),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, text_width(config)),
    }


def text_width(config: Any) -> int:
    """Channels of the text encoder's output, by the key that a family calls it."""
    keys = ("joint_attention_dim", "text_embed_dim", "context_in_dim", "cap_feat_dim", "text_dim", "caption_channels")
    return next(config[key] for key in keys if key in config)


def position_ids(grid: tuple[int, int], text: int, axes: int = 3) -> dict[str, torch.Tensor]:
    """`img_ids (S, axes)` and `txt_ids (T, axes)`."""
    rows, columns = grid
    return {"img_ids": torch.empty(rows * columns, axes), "txt_ids": torch.empty(text, axes)}


def flux_like(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    """Of a family whose pipeline packs latents and gives position ids, as FLUX.1's does."""
    return latents_and_text(config, samples, grid, text, packed=True) | position_ids(grid, text)
