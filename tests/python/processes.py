# SPDX-License-Identifier: MIT
"""What each of several processes does in test_distributed.py: processes.py RANK COUNT RENDEZVOUS"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist

import natten.functional as F
from natten import NeighborhoodAttention2D
from natten import distributed as sharded

WINDOWS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"kernel_size": 5}, (11, 5)),
    ({"kernel_size": 4}, (11, 5)),
    ({"kernel_size": (5, 3), "dilation": (2, 1)}, (11, 5)),
    ({"kernel_size": 5, "stride": (3, 1)}, (11, 5)),
    ({"kernel_size": (5, 3), "is_causal": (True, False), "dilation": (2, 1)}, (13, 5)),
    ({"kernel_size": (11, 3)}, (11, 5)),
]


def check_blocks(rank: int, count: int, axis: int) -> None:
    for window, extents in WINDOWS:
        if axis == 1:
            extents = extents[::-1]
            window = {k: v[::-1] if isinstance(v, tuple) else v for k, v in window.items()}
        torch.manual_seed(0)
        shape = (1, *extents, 2, 4)
        query, key, value = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)
        )
        d_out = torch.randn(shape, dtype=torch.float64)
        out, lse = F.na2d(query, key, value, **window, return_lse=True)
        d_lse = torch.randn_like(lse)
        wanted = torch.autograd.grad((out, lse), (query, key, value), (d_out, d_lse))
        # The first process has more than the others, the last what is left.
        total = extents[axis]
        sizes = [total // count + (i == 0) for i in range(count)]
        sizes[-1] += total - sum(sizes)
        begin, size = sum(sizes[:rank]), sizes[rank]

        def part(t: torch.Tensor, begin: int = begin, size: int = size) -> torch.Tensor:
            return t.detach().narrow(1 + axis, begin, size)

        mine = [part(t).clone().requires_grad_() for t in (query, key, value)]
        given = sizes if axis else None
        ours = sharded.na2d(*mine, **window, axis=axis, sizes=given, return_lse=True)
        torch.testing.assert_close(ours, (part(out), part(lse)))
        grads = torch.autograd.grad(ours, mine, (part(d_out), part(d_lse)))
        torch.testing.assert_close(grads, tuple(part(w) for w in wanted))


def check_data_parallel(rank: int, count: int) -> None:
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double()
    alone = copy.deepcopy(module)
    x = torch.randn(2 * count, 6, 6, 8, dtype=torch.float64)
    alone(x).square().mean().backward()
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for mine, other in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def main() -> None:
    rank, count = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=count
    )
    check_blocks(rank, count, 0)
    check_blocks(rank, count, 1)
    if count == 2:
        check_data_parallel(rank, count)
        import dtensors

        dtensors.check(rank, count)
    # Otherwise whoever is first takes the connections away from the others.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
