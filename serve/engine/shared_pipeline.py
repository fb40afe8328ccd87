"""Stock pipelines that share one set of weights: copies for one picture each, whose transformer and VAE are proxies of batchers.

A copy is the pipeline itself, its `__call__` untouched, with a scheduler of its own. Text is encoded by one picture at a time
(tokenizers keep state while they run), and what was encoded lately is remembered, since negative prompts repeat.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl.models import adapter_of
from ppcl.replacements.plan import Replacement
from serve.engine.batch_collation import Digests, group_of, join, rows_of
from serve.engine.batcher import Batcher, Member, Told
from serve.engine.compute_thread import Arithmetic

Plan = tuple[Replacement, ...]


class Kind(NamedTuple):
    """What a picture's steps cost depends on: the plan that is on, and the picture's pixels."""

    plan: Plan
    pixels: int


# Prompts whose embeddings are kept.
_REMEMBERED_PROMPTS = 32


class TransformerProxy(nn.Module):
    """Stands in a pipeline's copy where the transformer was: answers what a pipeline asks of it, and hands its calls on."""

    def __init__(self, transformer: nn.Module, kind: Kind, batcher: Batcher, member: Member):
        super().__init__()
        self.config, self.dtype, self.device = transformer.config, transformer.dtype, transformer.device
        self._architecture = adapter_of(transformer)
        self._kind, self._batcher, self._member = kind, batcher, member
        self._digests = Digests()

    def cache_context(self, name: str) -> contextlib.AbstractContextManager:
        """Caches of steps belong to one picture and not to a batch: there is none."""
        return contextlib.nullcontext()

    def forward(self, **arguments: Any) -> tuple[torch.Tensor]:
        arguments["return_dict"] = False
        group = self._kind, group_of(self._architecture, arguments, self._digests)
        rows = rows_of(self._architecture, arguments)
        return (self._batcher.call(group, rows, arguments, self._member),)


class VaeProxy(nn.Module):
    """Stands where the VAE was. It decodes one batch of pictures at a time: some VAEs keep state while they run."""

    def __init__(self, vae: nn.Module, batcher: Batcher, member: Member):
        super().__init__()
        self.config, self.dtype, self.device = vae.config, vae.dtype, vae.device
        self._batcher, self._member = batcher, member

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        group = tuple(latents.shape[1:]), latents.dtype
        return (self._batcher.call(group, latents.shape[0], latents, self._member),)


class SharedPipeline:
    """One pipeline for many pictures at once. `switch(transformer, plan)` is called between batches, by their thread.

    `arithmetic`: what computes. `most_rows`: of a batch of the transformer; `decoded_pixels`: of pictures that are decoded at once. `told`: of every batch of
    the transformer, with its `Kind` first in its group.
    """

    def __init__(
        self,
        pipeline: Any,
        switch: Callable[[nn.Module, Plan], None],
        most_rows: int,
        gather: float,
        decoded_pixels: int,
        told: Told,
        arithmetic: Arithmetic | None = None,
    ):
        self.stock, self._switch = pipeline, switch
        self.arithmetic = arithmetic or Arithmetic()
        self.adapter = adapter_of(pipeline.transformer)
        self._on: Plan | None = None
        self._encoding = threading.Lock()
        self._encoded: OrderedDict[Hashable, Any] = OrderedDict()
        compute = self.arithmetic
        self.denoising = Batcher(
            "denoising", lambda *batch: compute(self._forward, *batch), lambda group: most_rows, gather, told
        )
        self.decoding = Batcher(
            "decoding",
            lambda *batch: compute(self._decode, *batch),
            lambda group: self._decoded_at_once(group, decoded_pixels),
        )

    def copy(self, kind: Kind, member: Member) -> Any:
        """The pipeline for one picture."""
        made = copy.copy(self.stock)
        # Not by `setattr`, with which a pipeline also changes the configuration that all copies share.
        made.__dict__.update(
            {
                "transformer": TransformerProxy(self.stock.transformer, kind, self.denoising, member),
                "vae": VaeProxy(self.stock.vae, self.decoding, member),
                "scheduler": copy.deepcopy(self.stock.scheduler),
                "encode_prompt": self._encode_prompt,
            }
        )
        return made

    @property
    def alive(self) -> bool:
        return self.denoising.alive and self.decoding.alive

    def close(self) -> None:
        self.denoising.close()
        self.decoding.close()
        self.arithmetic.close()

    def prompt_tokens(self, prompt: str) -> int:
        """Counted by the pipeline's longest-reading tokenizer, without the template it puts a prompt into."""
        names = ("tokenizer_3", "tokenizer_2", "tokenizer")
        tokenizer = next(t for t in (getattr(self.stock, name, None) for name in names) if t is not None)
        with self._encoding:
            return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def _forward(self, group: tuple[Kind, Hashable], calls: Sequence[dict[str, Any]]) -> Sequence[torch.Tensor]:
        kind, _ = group
        self.plug(kind.plan)
        output = self.stock.transformer(**join(self.adapter, calls))[0]
        if output.is_cuda:
            # Or the batch would cost nothing, and the next one its time too.
            torch.cuda.synchronize()
        return output.split([rows_of(self.adapter, call) for call in calls])

    def plug(self, plan: Plan) -> None:
        """Leave the transformer with this plan on. Moves references only."""
        if plan != self._on:
            self._on = None
            self._switch(self.stock.transformer, plan)
            self._on = plan

    def _decode(self, group: Hashable, latents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        pictures = self.stock.vae.decode(torch.cat(list(latents)), return_dict=False)[0]
        return pictures.split([one.shape[0] for one in latents])

    def _decoded_at_once(self, group: tuple[tuple[int, ...], torch.dtype], most_pixels: int) -> int:
        *_, height, width = group[0]
        return max(1, most_pixels // (height * width * self.stock.vae_scale_factor**2))

    def _encode_prompt(self, *args: Any, **arguments: Any) -> Any:
        with self._encoding:

            def encoded() -> Any:
                return self.arithmetic(type(self.stock).encode_prompt, self.stock, *args, **arguments)

            key = (args, tuple(sorted(arguments.items())))
            try:
                known = self._encoded.get(key)
            except TypeError:  # tensors and lists have no hash to be remembered by
                return encoded()
            if known is None:
                known = self._encoded[key] = encoded()
                if len(self._encoded) > _REMEMBERED_PROMPTS:
                    self._encoded.popitem(last=False)
            self._encoded.move_to_end(key)
            return known
