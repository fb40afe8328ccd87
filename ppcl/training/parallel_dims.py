"""The `(dp, pp)` mesh of ranks, `pp` innermost: ranks that are neighbours in a pipeline have consecutive numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class ParallelDims:
    """One rank's position in the mesh. Without a process group it is the whole mesh, `dp = pp = 1`."""

    pp: int = 1
    dp: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def join(cls, pp: int, dp: int) -> ParallelDims:
        """This process's position in a mesh over the default process group; a collective call."""
        if pp * dp == 1:
            return cls()
        dims = cls(pp, dp, dist.get_rank())
        if dp > 1:
            # Every rank takes part in making every group, in the same order.
            for stage in range(pp):
                group = dist.new_group([replica * pp + stage for replica in range(dp)])
                if stage == dims.pp_rank:
                    dims.group = group
        return dims

    @property
    def pp_rank(self) -> int:
        return self.rank % self.pp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.pp

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the replicas of this stage, in place."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of this stage's replicas, in the order of the replicas."""
        if self.dp == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.dp)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def maximum(self, number: int) -> int:
        """The largest of all ranks' numbers, of every stage and replica."""
        if self.pp * self.dp == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def minimum(self, number: int) -> int:
        """The smallest of all ranks' numbers, of every stage and replica."""
        return -self.maximum(-number)

    def agreed(self, facts: Sequence[bool]) -> list[bool]:
        """Which of some facts hold on all ranks, of every stage and replica."""
        if self.pp * self.dp == 1:
            return list(facts)
        held = torch.tensor(facts, dtype=torch.int64)
        dist.all_reduce(held, op=dist.ReduceOp.MIN)
        return [bool(fact) for fact in held]

    def barrier(self) -> None:
        if self.pp * self.dp > 1:
            dist.barrier()
