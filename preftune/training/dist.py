"""Ranks, as torchrun sets them up. One process is rank 0 of 1, and nothing here does anything then."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from jaxtyping import Shaped
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all that train together."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, on every rank."""
        if self.world > 1:
            td.all_reduce(values)
        return values

    def first(self, compute: Callable[[], str]) -> str:
        """What rank 0 computes, on every rank: for what costs much reading and is the same for all."""
        if self.world == 1:
            return compute()
        said = [compute() if self.main else ""]
        td.broadcast_object_list(said)
        return said[0]

    def gather(self, values: Shaped[Tensor, "n"]) -> list[Shaped[Tensor, "_"]]:
        """The values of every rank, in the order of ranks; each may have another number of them."""
        if self.world == 1:
            return [values]
        n = torch.zeros(self.world, dtype=torch.int64, device=values.device)
        n[self.rank] = len(values)
        sizes: list[int] = self.sum(n).tolist()
        sent = values.new_zeros(max(sizes), dtype=torch.uint8 if values.dtype == torch.bool else values.dtype)
        sent[: len(values)] = values
        received = [torch.empty_like(sent) for _ in sizes]
        td.all_gather(received, sent)
        return [r[:size].to(values.dtype) for r, size in zip(received, sizes, strict=True)]

    def gather_items(self, items: Sequence[Item]) -> list[Item]:
        """The items of all ranks, in the order of ranks, on every rank: for texts and other small things."""
        if self.world == 1:
            return list(items)
        found: list[Any] = [None] * self.world
        td.all_gather_object(found, list(items))
        return [item for part in found for item in part]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            td.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` holds on any rank."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item())


ONE = Ranks()
"""One process by itself."""


def join(device: torch.device) -> Ranks:
    """Joins the process group that torchrun (or `accelerate launch`) describes in the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives run on the current device
    if not td.is_initialized():
        td.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Ranks(td.get_rank(), td.get_world_size())


def leave() -> None:
    """Leaves the process group, where there is one."""
    if td.is_initialized():
        td.destroy_process_group()
