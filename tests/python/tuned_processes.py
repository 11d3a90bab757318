# SPDX-License-Identifier: MIT
"""What each of two processes does in test_autotuner.py: tuned_processes.py RANK RENDEZVOUS"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import natten
from natten import NeighborhoodAttention2D, autotuner


def gathered(mine: object) -> list[object]:
    everyone: list[object] = [None, None]
    dist.all_gather_object(everyone, mine)
    return everyone


def step(module: NeighborhoodAttention2D, x: torch.Tensor) -> list[bytes]:
    module.zero_grad()
    out = module(x)
    out.square().mean().backward()
    results = [out, *(p.grad for p in module.parameters())]
    return [t.detach().numpy().tobytes() for t in results if t is not None]


def main() -> None:
    rank = int(sys.argv[1])
    os.environ["NATTEN_CACHE_DIR"] = f"{sys.argv[2]}-files-{rank}"  # as on two machines
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    natten.use_fused_na(True)
    natten.use_autotuner(True, True, steps_forward=3, steps_backward=3)
    module = NeighborhoodAttention2D(16, 2, 5)
    x, other = torch.randn(1, 20, 20, 16), torch.randn(2, 9, 9, 16)
    # The second process has found something of its own, and not what the first has.
    step(module, x if rank == 0 else other)
    assert len(autotuner.choices()) == 2, autotuner.choices()
    first, second = gathered(autotuner.export())
    assert first != second
    autotuner.share()
    assert gathered(autotuner.export()) == [first, first]
    for tensor in (x, other):
        mine, others = gathered(step(module, tensor))
        assert mine == others
    # What came later was not tuned by either.
    assert gathered(autotuner.export()) == [first, first]
    natten.use_autotuner(True, True)
    step(module, other)
    assert len(autotuner.choices()) == 4
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
