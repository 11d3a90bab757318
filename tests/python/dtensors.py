# SPDX-License-Identifier: MIT
"""What processes.py does with DTensor, which takes long to import: sharded tensors and layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import natten.functional as F
from natten import NeighborhoodAttention2D


def fused(q: Any, k: Any, v: Any, rpb: Any, ak: Any, av: Any, mask: Any = None) -> Any:
    more = {"return_lse": True, "key_padding_mask": mask}
    return F.na2d(q, k, v, 3, 1, (True, False), rpb, 0.5, ak, av, **more)


def hiding(*tensors: Any) -> Any:
    return fused(*tensors[:6], tensors[6].detach() > 0.5)


def unfused(q: Any, k: Any, v: Any, rpb: Any, ak: Any, av: Any, mask: Any = None) -> Any:
    q, k, v, ak, av = (t.movedim(-2, 1) for t in (q, k, v, ak, av))
    attn = F.na2d_qk(q, k, 3, 1, ak, rpb=rpb, key_padding_mask=mask)
    return attn, F.na2d_av(attn, v, 3, 1, av)


def results(function: Any, leaves: list[Any]) -> tuple[list[Any], int]:
    """Results and gradients, and how often processes spoke with each other."""
    with CommDebugMode() as comm:
        outs = function(*leaves)
        ones = [torch.ones_like(out) for out in outs]
        found = torch.autograd.grad(outs, leaves, ones, allow_unused=True)
    return [*outs, *(grad for grad in found if grad is not None)], comm.get_total_counts()


def check_sharded_tensors(count: int, heads: int, kv_heads: int) -> None:
    """DTensors cut by batch and by heads need no communication; others are right, too."""
    mesh = init_device_mesh("cpu", (count,))
    torch.manual_seed(0)
    maps = [(2, 4, 5, heads, 3), (2, 4, 5, kv_heads, 3), (2, 4, 5, kv_heads, 6)]
    shapes = [*maps, (heads, 5, 5), (2, 2, kv_heads, 3), (2, 2, kv_heads, 6), (2, 4, 5, kv_heads)]
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    by_batch = [Shard(0)] * 3 + [Replicate()] + [Shard(0)] * 3
    by_heads = [Shard(3)] * 3 + [Shard(0)] + [Shard(2)] * 2 + [Shard(3)]
    by_rows = [Shard(1)] * 3 + [Replicate()] * 3 + [Shard(1)]
    silent = [by_batch, by_heads] if kv_heads % count == 0 else [by_batch]
    for function, used in ((fused, 6), (fused, 7), (hiding, 7), (unfused, 6), (unfused, 7)):
        wanted, _ = results(function, whole[:used])
        for places in (by_batch, by_heads, by_rows):
            leaves = [
                distribute_tensor(t.detach(), mesh, [place]).requires_grad_()
                for t, place in zip(whole[:used], places[:used], strict=True)
            ]
            ours, spoken = results(function, leaves)
            # In torch 2.5 what unfused masks are made of is not cut without a word.
            if not (function is unfused and used == 7 and torch.__version__.startswith("2.5")):
                assert (spoken == 0) == (places in silent), (function, used, places, spoken)
            for mine, true in zip(ours, wanted, strict=True):
                torch.testing.assert_close(mine.full_tensor(), true)


def check_dropout(count: int) -> None:
    query = torch.randn(2, 4, 5, 2, 3)
    mesh = init_device_mesh("cpu", (count,))
    part = distribute_tensor(query, mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="a process sees its part only"):
        F.na2d(part, part, part, 3, dropout_p=0.5)


def check_fully_sharded(rank: int, count: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True) for _ in range(2))
    ).double()
    alone = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (count,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(2 * count, 6, 6, 8, dtype=torch.float64)
    for m, part in ((alone, x), (model, x[2 * rank : 2 * rank + 2])):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(part).square().mean().backward()
        optimizer.step()
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor(), other)


def check(part: str, rank: int, count: int) -> None:
    if part == "fully sharded":
        check_fully_sharded(rank, count)
        return
    check_sharded_tensors(count, 4, 2)
    check_sharded_tensors(count, 6, 3)
    check_dropout(count)
