"""Stock pipelines that share one set of weights: a copy for each image, whose transformer and VAE are batcher proxies.

A copy is the pipeline itself, its `__call__` untouched, with its own scheduler. One image at a time encodes text, since
tokenizers keep state while they run. Recent embeddings are cached, since negative prompts repeat.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl.lora import AppliedLora
from ppcl.models import adapter_of
from ppcl.replacements import Plan
from serve.engine.batch_collation import Digests, group_of, join, rows_of
from serve.engine.batcher import Batcher, BatchObserver, Ticket
from serve.engine.compute_thread import ComputeThread


class WorkloadKey(NamedTuple):
    """What images of one batch have in common: the plan and the pixels, on which costs depend, and the LoRA."""

    plan: Plan
    pixels: int
    lora: AppliedLora | None = None


# Prompts whose embeddings are cached.
_CACHED_PROMPTS = 32


class TransformerProxy(nn.Module):
    """Replaces the transformer in a pipeline's copy: exposes its attributes and passes its calls to the batcher."""

    def __init__(self, transformer: nn.Module, workload: WorkloadKey, batcher: Batcher, ticket: Ticket):
        super().__init__()
        self.config, self.dtype, self.device = transformer.config, transformer.dtype, transformer.device
        self._architecture = adapter_of(transformer)
        self._workload, self._batcher, self._ticket = workload, batcher, ticket
        self._digests = Digests()

    def cache_context(self, name: str) -> contextlib.AbstractContextManager:
        """Return an empty context: step caches belong to one image and not to a batch."""
        return contextlib.nullcontext()

    def forward(self, **arguments: Any) -> tuple[torch.Tensor]:
        arguments["return_dict"] = False
        group = self._workload, group_of(self._architecture, arguments, self._digests)
        rows = rows_of(self._architecture, arguments)
        return (self._batcher.call(group, rows, arguments, self._ticket),)


class VaeProxy(nn.Module):
    """Replaces the VAE in a pipeline's copy. One batch decodes at a time: some VAEs keep state while they run."""

    def __init__(self, vae: nn.Module, batcher: Batcher, ticket: Ticket):
        super().__init__()
        self.config, self.dtype, self.device = vae.config, vae.dtype, vae.device
        self._batcher, self._ticket = batcher, ticket

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        group = tuple(latents.shape[1:]), latents.dtype
        return (self._batcher.call(group, latents.shape[0], latents, self._ticket),)


@dataclass(frozen=True)
class BatchLimits:
    """`max_rows`: of a transformer batch. `gather_s`: see `Batcher`. `decoded_pixels`: of images decoded at once."""

    max_rows: int
    gather_s: float
    decoded_pixels: int


class SharedPipeline:
    """One pipeline for many images at once.

    `switch(transformer, plan, lora)` is called between batches, in the compute thread. `on_batch` is called after every
    batch of the transformer; its group is a tuple whose first item is the `WorkloadKey`.
    """

    def __init__(
        self,
        pipeline: Any,
        switch: Callable[[nn.Module, Plan, AppliedLora | None], None],
        limits: BatchLimits,
        on_batch: BatchObserver,
        compute: ComputeThread | None = None,
    ):
        self.stock, self._switch, self._limits = pipeline, switch, limits
        self.compute = compute or ComputeThread()
        self.adapter = adapter_of(pipeline.transformer)
        self._active: tuple[Plan, AppliedLora | None] | None = None
        self._encoding = threading.Lock()
        self._embeddings: OrderedDict[Hashable, Any] = OrderedDict()
        run = self.compute
        self.denoising = Batcher(
            "denoising",
            lambda *batch: run(self._forward, *batch),
            lambda group: limits.max_rows,
            limits.gather_s,
            on_batch,
        )
        self.decoding = Batcher("decoding", lambda *batch: run(self._decode, *batch), self._max_decoded)

    def copy(self, workload: WorkloadKey, ticket: Ticket) -> Any:
        """The pipeline for one image."""
        clone = copy.copy(self.stock)
        # Not by `setattr`, with which a pipeline also changes the configuration that all copies share.
        clone.__dict__.update(
            {
                "transformer": TransformerProxy(self.stock.transformer, workload, self.denoising, ticket),
                "vae": VaeProxy(self.stock.vae, self.decoding, ticket),
                "scheduler": copy.deepcopy(self.stock.scheduler),
                "encode_prompt": self._encode_prompt,
            }
        )
        return clone

    @property
    def alive(self) -> bool:
        return self.denoising.alive and self.decoding.alive

    def close(self) -> None:
        self.denoising.close()
        self.decoding.close()
        self.compute.close()

    def prompt_tokens(self, prompt: str) -> int:
        """Count a prompt's tokens with the tokenizer of the longest limit, without the pipeline's template."""
        names = ("tokenizer_3", "tokenizer_2", "tokenizer")
        tokenizer = next(t for t in (getattr(self.stock, name, None) for name in names) if t is not None)
        with self._encoding:
            return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def _forward(self, group: tuple[WorkloadKey, Hashable], calls: Sequence[dict[str, Any]]) -> Sequence[torch.Tensor]:
        workload, _ = group
        self.activate(workload.plan, workload.lora)
        output = self.stock.transformer(**join(self.adapter, calls))[0]
        if output.is_cuda:
            # Otherwise the batch would seem free and the next one pay for both.
            torch.cuda.synchronize()
        return output.split([rows_of(self.adapter, call) for call in calls])

    def activate(self, plan: Plan, lora: AppliedLora | None = None) -> None:
        """Switch the transformer to a plan with a LoRA or none. Moves references only."""
        if (plan, lora) != self._active:
            self._active = None
            self._switch(self.stock.transformer, plan, lora)
            self._active = plan, lora

    def _decode(self, group: Hashable, latents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        images = self.stock.vae.decode(torch.cat(list(latents)), return_dict=False)[0]
        return images.split([tensor.shape[0] for tensor in latents])

    def _max_decoded(self, group: tuple[tuple[int, ...], torch.dtype]) -> int:
        """Return the number of images of a shape of latents that are decoded at once."""
        *_, height, width = group[0]
        return max(1, self._limits.decoded_pixels // (height * width * self.stock.vae_scale_factor**2))

    def _encode_prompt(self, *args: Any, **arguments: Any) -> Any:
        """Return the stock pipeline's embeddings of a prompt, from the cache where possible."""

        def encode() -> Any:
            return self.compute(type(self.stock).encode_prompt, self.stock, *args, **arguments)

        with self._encoding:
            key = (args, tuple(sorted(arguments.items())))
            try:
                embeddings = self._embeddings.get(key)
            except TypeError:  # tensors and lists cannot be keys
                return encode()
            if embeddings is None:
                embeddings = self._embeddings[key] = encode()
                if len(self._embeddings) > _CACHED_PROMPTS:
                    self._embeddings.popitem(last=False)
            self._embeddings.move_to_end(key)
            return embeddings
