# SPDX-License-Identifier: MIT
"""How DTensor may cut the ops over processes: by batch and by heads, without communication.

Any other placement is one that DTensor changes first, into one of these or into whole tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _call, _lib, _ops
from ._call import Op, rank_of

_registered = False


def shard_ops() -> bool:
    """Tells DTensor, once somebody uses it: importing it takes long. Dynamo runs this while it
    traces, because of the mark below."""
    global _registered
    if not _registered and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        for op in (*_call.OPS, *_call.MASKED_OPS):
            names = [op.name, *([_ops.TRACED[op.name]] if op.name in _ops.TRACED else [])]
            register_sharding([getattr(_ops, name) for name in names])(_strategy(op))
        _registered = True
    return True


shard_ops._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_dropout(tensor: Tensor) -> None:
    """Raises for a DTensor."""
    if type(tensor).__name__ == "DTensor":
        raise NotImplementedError(
            "dropout_p > 0 is not supported for DTensors: which weights are dropped depends on "
            "their place in the whole tensor, and a process sees its part only."
        )


def _heads(op: Op, role: int, rank: int) -> int:
    """Which dimension is the heads'."""
    role = role if role < _lib.D_QUERY else role - _lib.D_QUERY
    if role == _lib.RPB:
        return 0
    if op.order == _lib.HEADS_FIRST:
        return 1
    return 2 if role in (_lib.ADDITIONAL_KEY, _lib.ADDITIONAL_VALUE) else 1 + rank


def _strategy(op: Op) -> Callable[..., Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    count = len(op.inputs)

    def cut(role: int, dim: int | None, output: bool) -> Any:
        if dim is not None:
            return Shard(dim)
        # Every process' batches add to the gradient of the bias, which has no batch.
        return Partial() if output and role == _lib.D_RPB else Replicate()

    def strategy(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {r: t for r, t in zip(op.inputs, arguments[:count], strict=True) if t is not None}
        rank = rank_of(arguments[count])
        # Between the scale and this, masked operators have dropout.
        wanted = arguments[count + 2 + op.masks] if op.chooses else (1 << len(op.outputs)) - 1

        def placements(dim_of: Callable[[int], int | None]) -> tuple[list[Any], list[Any]]:
            outputs = [
                cut(role, dim_of(role), True) if wanted >> i & 1 else Replicate()
                for i, role in enumerate(op.outputs)
            ]
            inputs = [cut(r, dim_of(r), False) if r in given else None for r in op.inputs]
            return outputs, inputs + [None] * (len(arguments) - count)

        ways = [
            ([Replicate()] * len(op.outputs), placements(lambda role: None)[1]),
            placements(lambda role: None if role in (_lib.RPB, _lib.D_RPB) else 0),
        ]
        heads = {tensor.shape[_heads(op, role, rank)] for role, tensor in given.items()}
        processes = next(iter(given.values())).mesh.size()
        # Heads that share keys must stay together.
        if len(heads) == 1 or all(number % processes == 0 for number in heads):
            ways.append(placements(lambda role: _heads(op, role, rank)))
        return ways

    return strategy
