"""A transformer in which any plan can be plugged in, with replacements that are trained by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl.models import ModelAdapter, swap
from ppcl.models.block_view import linear_at
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement, TunedBlock
from ppcl.replacements.low_rank_modulation import ModulationBasis
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.finetuning.tuned_blocks import read_block
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.sharding import gathered, mesh_of, shard


class _Checkpointed(nn.Module):
    """A block whose inner activations are recomputed in the backward pass instead of kept."""

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments: Any) -> Any:
        return checkpoint(self.block, use_reentrant=False, **arguments)


@contextmanager
def _collected(block: nn.Module, adapter: ModelAdapter, features: list[torch.Tensor]) -> Iterator[None]:
    """Append the image stream behind a block to `features` whenever the block runs."""

    def collect(module: nn.Module, given: Any, returned: tuple) -> None:
        features.append(adapter.from_returned(returned).img)

    handle = block.register_forward_hook(collect)
    try:
        yield
    finally:
        handle.remove()


class VariantModel:
    """The teacher's transformer, frozen, and the replacements from `files`, of which some can be trained.

    `tuned`: of the teacher's blocks those that are trained as well, as copies, each without the parts at these paths.
    """

    def __init__(
        self,
        teacher: Teacher,
        files: Mapping[Replacement, Path],
        tuned: Mapping[TunedBlock, Sequence[str]],
        device: str,
        dtype: torch.dtype,
        activation_checkpointing: bool,
        shard_over: ParallelDims | None = None,
    ):
        """`shard_over`: ranks over which the blocks are sharded, each as soon as it is loaded; None: all are whole."""
        self.adapter, self.device, self.dtype = teacher.adapter, device, dtype
        self.activation_checkpointing = activation_checkpointing
        self.mesh = mesh_of(shard_over, device) if shard_over else None
        prepare = partial(shard, mesh=self.mesh) if self.mesh else None
        self.transformer = teacher.transformer(device=device, dtype=dtype, prepare=prepare)
        self.switch = VariantSwitcher(teacher, files)
        for one, left_out in tuned.items():
            module = read_block(teacher, one, left_out, device)
            if prepare:
                prepare(module)
            self.switch.add(one, module, self.transformer.device, dtype)
        if self.mesh:
            self._multiply_out_modulations()

    def _multiply_out_modulations(self) -> None:
        """Compute the products of low-rank modulations while each block is gathered: later none is whole."""
        bases = [module for module in map(self.module, self.switch.files) if isinstance(module, ModulationBasis)]
        for number, block in enumerate(self.switch.blocks(self.transformer) if bases else ()):
            parts = self.adapter.parts_of(self.transformer, number, block)
            with gathered([block]):
                for basis in bases:
                    basis.prepare(linear_at(block, where.modulation) for where in parts.values())

    def module(self, replacement: Replacement) -> nn.Module:
        return self.switch.module(replacement, self.transformer.device, self.dtype)

    def trained_parameters(self, replacements: Sequence[Replacement]) -> dict[str, nn.Parameter]:
        """Make replacements trainable; gives their parameters as `<replacement>.<parameter>`. Call it once.

        They are trained in float32 whatever the teacher runs in; autocast brings both together. Where the teacher is
        sharded all replacements are from here on, those that are not trained too.
        """
        for replacement in replacements:
            self.module(replacement).float().requires_grad_(True)
        if self.mesh:
            for module in map(self.module, self.switch.files):
                if not isinstance(module, ModulationBasis):
                    shard(module, self.mesh)
        return {
            f"{replacement.name}.{name}": p
            for replacement in replacements
            for name, p in self.module(replacement).named_parameters()
        }

    def velocity(
        self,
        plan: Sequence[Replacement],
        inputs: dict[str, Any],
        training: bool = False,
        features: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The velocity of the variant `plan`, shaped like the stock output; leaves the plan plugged in.

        `features`: gets the image stream `(B, S, d)` behind every block, in order.
        """
        self.switch(self.transformer, plan)
        if training and self.activation_checkpointing:
            blocks = self.adapter.blocks(self.transformer)
            swap(self.transformer, {number: _Checkpointed(block) for number, block in enumerate(blocks)})
        with ExitStack() as hooks:
            if features is not None:
                for block in self.adapter.blocks(self.transformer):
                    hooks.enter_context(_collected(block, self.adapter, features))
            return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        autocast = torch.autocast(
            self.transformer.device.type,
            torch.bfloat16,
            enabled=self.dtype is torch.bfloat16,
            # Else the casts of all weights stay to the end, which recomputing is there to avoid.
            cache_enabled=not self.activation_checkpointing,
        )
        with autocast:
            return self.transformer(**{**inputs, "return_dict": False})[0]

    def unplug(self) -> None:
        """Leave the teacher itself."""
        self.switch(self.transformer, ())
