"""Prompt embeddings by the pipeline's own text encoders, each kept at its own length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ppcl.config.schema import Sampling
from ppcl.models import ModelAdapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Embedding = dict[str, torch.Tensor]
"""One prompt's arguments of the transformer: `encoder_hidden_states` `(T, d)`, `pooled_projections` `(d',)`."""

TEXT = "encoder_hidden_states"
_PIPELINE_ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


@dataclass(frozen=True)
class EncodedPrompts:
    """A batch of prompts: the id and the embedding of each.

    `negative`: the embedding of the negative prompt, where the pipeline makes unconditional calls.
    """

    ids: Sequence[int]
    embeddings: list[Embedding]
    negative: Embedding | None = None


@torch.no_grad()
def encode(
    pipeline: Any,
    adapter: ModelAdapter,
    texts: list[str],
    sampling: Sampling,
    negative: bool = False,
    transformer_config: Mapping[str, Any] | None = None,
) -> list[Embedding]:
    """Embeddings of a batch of prompts, on the CPU. Padding is cut off, so no mask is needed.

    `negative`: they are negative prompts. `transformer_config`: of a pipeline without its transformer; some pipelines
    ask it for the width of a text encoder that is left out.
    """
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    # Families with several text encoders give each the same prompt by default, but some require the argument.
    arguments: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
    if "do_classifier_free_guidance" in accepted:
        arguments["do_classifier_free_guidance"] = False
    # The stock call skips no layers of a negative prompt.
    if "clip_skip" in accepted and not negative:
        arguments["clip_skip"] = sampling.arguments.get("clip_skip")
    if "max_sequence_length" in accepted:
        arguments["max_sequence_length"] = longest_prompt(type(pipeline), sampling)
    if (layers := sampling.arguments.get("text_encoder_out_layers")) is not None:
        arguments["text_encoder_out_layers"] = tuple(layers)
    with _configured(pipeline, transformer_config):
        returned = pipeline.encode_prompt(prompt=texts, **arguments)
    named = {name: value for name, value in zip(adapter.encoded, returned, strict=True) if name}
    mask = named.pop(adapter.text_mask, None) if adapter.text_mask else None
    embeddings = [{name: value[row].cpu() for name, value in named.items()} for row in range(len(texts))]
    if mask is not None:
        for embedding, valid in zip(embeddings, mask.bool().cpu(), strict=True):
            embedding[TEXT] = embedding[TEXT][valid]
    return embeddings


@contextmanager
def _configured(pipeline: Any, config: Mapping[str, Any] | None) -> Iterator[None]:
    """Give a pipeline without a transformer the configuration of one."""
    if config is None or pipeline.transformer is not None:
        yield
        return
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    try:
        yield
    finally:
        pipeline.transformer = None


def longest_prompt(pipeline_class: type, sampling: Sampling) -> int:
    """The number of tokens the pipeline's own call cuts a prompt to."""
    default = inspect.signature(pipeline_class.__call__).parameters["max_sequence_length"].default
    return sampling.arguments.get("max_sequence_length", default)


def negative_prompt(pipeline_class: type[DiffusionPipeline], sampling: Sampling) -> str | None:
    """The prompt of the unconditional calls; None where the pipeline makes none."""
    given = sampling.arguments.get("negative_prompt")
    # A pipeline that decides by guidance_scale alone encodes an empty one where none is given.
    by_scale = "do_classifier_free_guidance" in inspect.signature(pipeline_class.encode_prompt).parameters
    return "" if given is None and by_scale else given


def collate(embeddings: list[Embedding], adapter: ModelAdapter) -> dict[str, torch.Tensor | None]:
    """Prompt arguments of one transformer call: text `(B, T, d)` padded with zeros to the longest, and its mask.

    The mask is None where no text is padded, as in the stock pipeline.
    """
    batch: dict[str, torch.Tensor | None] = {
        name: torch.stack([e[name] for e in embeddings]) for name in embeddings[0] if name != TEXT
    }
    text = torch.nn.utils.rnn.pad_sequence([e[TEXT] for e in embeddings], batch_first=True)
    batch[TEXT] = text
    if adapter.text_mask:
        lengths = torch.tensor([len(e[TEXT]) for e in embeddings])
        mask = (torch.arange(text.shape[1])[None] < lengths[:, None]).long()
        batch[adapter.text_mask] = None if mask.all() else mask
    return batch


def pipeline_arguments(batch: dict[str, torch.Tensor | None], device: str, negative: bool = False) -> dict[str, Any]:
    """`collate`'s batch as arguments of the pipeline's call; `negative`: of the unconditional side."""
    prefix = "negative_" if negative else ""
    return {
        prefix + _PIPELINE_ARGUMENTS[name]: None if value is None else value.to(device) for name, value in batch.items()
    }
