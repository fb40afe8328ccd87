"""The names of tensors in a family's original release, which ComfyUI and others read: the way back from diffusers'.

Where the original keeps one matrix, diffusers keeps several: they are put on top of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ppcl.errors import UserError

Tensors = dict[str, torch.Tensor]

_KINDS = ("weight", "bias")


@dataclass(frozen=True)
class _Names:
    """Original modules by path, each with the diffusers modules that it consists of, in order.

    `scales`: RMS norms, by the original's full name. `swapped`: modulations whose two chunks are in the other order.
    `tensors`: single tensors by the original's name. Modules that a block does not have are left out.
    """

    modules: Mapping[str, Sequence[str]]
    scales: Mapping[str, str]
    swapped: Sequence[str] = ()
    tensors: Mapping[str, str] | None = None

    def convert(self, state: Tensors) -> Tensors:
        """Raises `UserError` for a tensor that has no original name."""
        left, made = dict(state), {}
        for original, sources in self.modules.items():
            for kind in _KINDS:
                names = [f"{source}.{kind}" for source in sources]
                if names[0] in left:
                    parts = [left.pop(name) for name in names]
                    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
                    if original in self.swapped:
                        tensor = torch.cat(tensor.chunk(2)[::-1])
                    made[f"{original}.{kind}"] = tensor
        for original, source in {**self.scales, **(self.tensors or {})}.items():
            if source in left:
                made[original] = left.pop(source)
        if left:
            raise UserError(f"the tensor {next(iter(left))} has no name in the original release's layout")
        return made


_FLUX_LISTS = {
    "transformer_blocks": (
        "double_blocks",
        _Names(
            {
                "img_mod.lin": ["norm1.linear"],
                "txt_mod.lin": ["norm1_context.linear"],
                "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
                "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
                "img_attn.proj": ["attn.to_out.0"],
                "txt_attn.proj": ["attn.to_add_out"],
                "img_mlp.0": ["ff.net.0.proj"],
                "img_mlp.2": ["ff.net.2"],
                "txt_mlp.0": ["ff_context.net.0.proj"],
                "txt_mlp.2": ["ff_context.net.2"],
            },
            {
                "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
                "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
                "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
                "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
            },
        ),
    ),
    "single_transformer_blocks": (
        "single_blocks",
        _Names(
            {
                "modulation.lin": ["norm.linear"],
                "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
                "linear2": ["proj_out"],
            },
            {
                "norm.query_norm.scale": "attn.norm_q.weight",
                "norm.key_norm.scale": "attn.norm_k.weight",
            },
        ),
    ),
}
_FLUX_OUTSIDE = _Names(
    {
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
        "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
        "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
        "txt_in": ["context_embedder"],
        "img_in": ["x_embedder"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    {},
    swapped=["final_layer.adaLN_modulation.1"],
)

_SD3_BLOCK = {
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}
_SD3_SCALES = {
    "x_block.attn.ln_q.weight": "attn.norm_q.weight",
    "x_block.attn.ln_k.weight": "attn.norm_k.weight",
    "x_block.attn2.ln_q.weight": "attn2.norm_q.weight",
    "x_block.attn2.ln_k.weight": "attn2.norm_k.weight",
    "context_block.attn.ln_q.weight": "attn.norm_added_q.weight",
    "context_block.attn.ln_k.weight": "attn.norm_added_k.weight",
}
_SD3_LISTS = {"transformer_blocks": ("joint_blocks", _Names(_SD3_BLOCK, _SD3_SCALES))}
# The text modulation of the block that makes no text holds the same two chunks as the model's last norm.
_SD3_LAST = _Names(_SD3_BLOCK, _SD3_SCALES, swapped=["context_block.adaLN_modulation.1"])
_SD3_OUTSIDE = _Names(
    {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
        "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
        "context_embedder": ["context_embedder"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    {},
    swapped=["final_layer.adaLN_modulation.1"],
    tensors={"pos_embed": "pos_embed.pos_embed"},
)


def _flux(block_list: str | None, index: int, drops_text: bool, state: Tensors) -> Tensors:
    if block_list is None:
        return _FLUX_OUTSIDE.convert(state)
    original, names = _FLUX_LISTS[block_list]
    return _with_prefix(f"{original}.{index}.", names.convert(state))


def _sd3(block_list: str | None, index: int, drops_text: bool, state: Tensors) -> Tensors:
    if block_list is None:
        return _SD3_OUTSIDE.convert(state)
    original, names = _SD3_LISTS[block_list]
    return _with_prefix(f"{original}.{index}.", (_SD3_LAST if drops_text else names).convert(state))


def _qwen_image(block_list: str | None, index: int, drops_text: bool, state: Tensors) -> Tensors:
    """The original release is a diffusers folder: its names are diffusers'."""
    return state if block_list is None else _with_prefix(f"{block_list}.{index}.", state)


def _with_prefix(prefix: str, state: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


_FAMILIES: dict[str, Callable[[str | None, int, bool, Tensors], Tensors]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen_image,
}


def original_tensors(transformer: str, block_list: str | None, index: int, drops_text: bool, state: Tensors) -> Tensors:
    """The tensors of one block, or with `block_list` None of what lies outside of the blocks, as the release has them.

    `transformer`: the diffusers class. `state`: by name in the block. `drops_text`: the block makes no text stream.
    Raises `UserError` for a family whose layout is not known.
    """
    if transformer not in _FAMILIES:
        raise UserError(
            f"the original layout of {transformer} is not known; it is of {', '.join(sorted(_FAMILIES))}; use --format "
            "diffusers"
        )
    return _FAMILIES[transformer](block_list, index, drops_text, state)
