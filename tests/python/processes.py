# SPDX-License-Identifier: MIT
"""What each of several processes does in test_distributed.py: processes.py PART RANK COUNT
RENDEZVOUS"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

import natten.functional as F
from natten import NattenError, NeighborhoodAttention2D
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


def check_other_ranks(rank: int, count: int) -> None:
    """Sequences with a bias and additional tokens, whose gradients are to be summed; volumes cut
    along the middle axis."""
    torch.manual_seed(0)
    shapes = [(1, 13, 4, 4), (1, 13, 2, 4), (1, 13, 2, 6), (4, 9), (1, 3, 2, 4), (1, 3, 2, 6)]
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sizes = [13 // count] * (count - 1) + [13 - 13 // count * (count - 1)]
    begin, size = sum(sizes[:rank]), sizes[rank]
    window: dict[str, Any] = {"kernel_size": 5, "dilation": 2, "is_causal": True}

    def call(function: Any, q: Any, k: Any, v: Any, rpb: Any, ak: Any, av: Any) -> Any:
        return function(q, k, v, **window, rpb=rpb, additional_keys=ak, additional_values=av)

    out = call(F.na1d, *whole)
    d_out = torch.randn_like(out)
    wanted = list(torch.autograd.grad(out, whole, d_out))
    parts = [t.detach().narrow(1, begin, size) if i < 3 else t for i, t in enumerate(whole)]
    mine = [t.detach().clone().requires_grad_() for t in parts]
    ours = call(sharded.na1d, *mine)
    torch.testing.assert_close(ours, out[:, begin : begin + size])
    grads = torch.autograd.grad(ours, mine, d_out[:, begin : begin + size])
    for i, grad in enumerate(grads):
        if i < 3:
            torch.testing.assert_close(grad, wanted[i].narrow(1, begin, size))
        else:
            dist.all_reduce(grad)
            torch.testing.assert_close(grad, wanted[i])

    volume = torch.randn(1, 3, 13, 4, 2, 4, dtype=torch.float64)
    out = F.na3d(volume, volume, volume, (3, 7, 3))
    part = volume.narrow(2, begin, size)
    ours = sharded.na3d(part, part, part, (3, 7, 3), axis=1, sizes=sizes)
    torch.testing.assert_close(ours, out.narrow(2, begin, size))
    with pytest.raises(NattenError, match="sizes must hold every process' extent along axis 1"):
        sharded.na3d(part, part, part, 3, axis=1, sizes=[13] * count)


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


def check_data_parallel_on_gpus(rank: int, count: int) -> None:
    """In half precision, with a process for each GPU; torch sums what is half in any order."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(64, 2, 7, rel_pos_bias=True).cuda()
    alone = copy.deepcopy(module)
    x = torch.randn(4 * count, 20, 21, 64).cuda()
    parallel = torch.nn.parallel.DistributedDataParallel(module, device_ids=[rank])
    with torch.autocast("cuda", torch.bfloat16):
        loss = alone(x).float().square().mean()
        part = parallel(x[4 * rank : 4 * rank + 4]).float().square().mean()
    loss.backward()
    part.backward()
    for mine, other in zip(module.parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).norm() <= 0.02 * other.grad.norm()


def main() -> None:
    part, rank, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    backend = "nccl" if part == "data parallel on GPUs" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{sys.argv[4]}", rank=rank, world_size=count
    )
    if part == "blocks":
        check_blocks(rank, count, 0)
        check_blocks(rank, count, 1)
        check_other_ranks(rank, count)
    elif part == "data parallel":
        check_data_parallel(rank, count)
    elif part == "data parallel on GPUs":
        check_data_parallel_on_gpus(rank, count)
    else:
        import dtensors

        dtensors.check(part, rank, count)
    # Otherwise whoever is first takes the connections away from the others.
    dist.barrier()
    dist.destroy_process_group()
    # All is checked. torch's threads may outlive it, and then end the process with an abort.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
