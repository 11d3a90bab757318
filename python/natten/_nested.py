# SPDX-License-Identifier: MIT
"""Nested tensors: the function of each item, and the results nested as the first argument is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._errors import NattenError, NattenTypeError


def _dims(name: str, rank: int) -> int:
    """Dimensions of an item, its batch included. (A mask that has heads must have a batch.)"""
    if name in ("additional_keys", "additional_values"):
        return 4
    return rank + (1 if name == "key_padding_mask" else 3)


def over_items(
    function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...], rank: int
) -> Any:
    """`arguments` holds a nested tensor. Items have a batch of their own or none: all but the bias
    must be nested alike, with as many items."""
    tensors = {n: arguments[n] for n in names if arguments.get(n) is not None}
    first = next(iter(tensors))
    count = tensors[first].size(0)
    if not count:  # then there are no sizes to make results of
        raise NattenError(f"{first} is a nested tensor without items.")
    items: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise NattenTypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.is_nested != (name != "rpb"):
            what = "must not be" if name == "rpb" else "must be, too"
            raise NattenError(f"{first} is a nested tensor: {name} {what}.")
        if name == "rpb":
            continue
        if tensor.size(0) != count:
            raise NattenError(f"{name} has {tensor.size(0)} items, but {first} has {count}.")
        items[name] = tensor.unbind()
    results = []
    for i in range(count):
        mine = {name: parts[i] for name, parts in items.items()}
        batched = mine[first].dim() == rank + 3
        if not batched:
            mine = {
                name: t.unsqueeze(0) if t.dim() == _dims(name, rank) - 1 else t
                for name, t in mine.items()
            }
        try:
            result = function(**{**arguments, **mine})
        except NattenError as error:
            raise type(error)(f"Item {i}: {error}") from None
        parts = result if isinstance(result, tuple) else (result,)
        results.append(parts if batched else tuple(part.squeeze(0) for part in parts))
    outputs = tuple(nest(list(parts), tensors[first]) for parts in zip(*results, strict=True))
    return outputs if len(outputs) > 1 else outputs[0]


def nest(parts: list[Tensor], like: Any) -> Tensor:
    """Items nested as `like` is, and as ragged."""
    if like.layout != torch.jagged:
        return torch.nested.as_nested_tensor(parts)
    axis = like._ragged_idx
    if like.lengths() is not None:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    # The same offsets, so that torch knows the result to be as ragged as the argument.
    return torch.nested.nested_tensor_from_jagged(
        torch.cat(parts, axis - 1), like.offsets(), jagged_dim=axis
    )
