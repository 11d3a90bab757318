# SPDX-License-Identifier: MIT
"""Window arguments and tiles as users write them, checked and made into tuples.

na_dim is the number of axes, 1 to 3. Errors: NattenTypeError for a wrong type, NattenError for a
wrong value (also a ValueError).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._errors import NattenError, NattenTypeError
from .._window import bools, check_rank, ints

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "check_tiling_config",
]


def check_tensor(name: str, value: Any) -> Any:
    """A tensor, and nothing else."""
    if not isinstance(value, Tensor):
        raise NattenTypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    return value


def _positive(name: str, na_dim: int, value: Any) -> tuple[int, ...]:
    result = ints(name, value, check_rank(na_dim))
    for axis, size in enumerate(result):
        if size < 1:
            raise NattenError(f"{name} must be at least 1, got {size} on axis {axis}.")
    return result


def check_kernel_size_arg(na_dim: int, kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """kernel_size for each axis."""
    return _positive("kernel_size", na_dim, kernel_size)


def check_stride_arg(na_dim: int, stride: int | Sequence[int] | None) -> tuple[int, ...]:
    """stride for each axis; None means 1."""
    return _positive("stride", na_dim, 1 if stride is None else stride)


def check_dilation_arg(na_dim: int, dilation: int | Sequence[int] | None) -> tuple[int, ...]:
    """dilation for each axis; None means 1."""
    return _positive("dilation", na_dim, 1 if dilation is None else dilation)


def check_input_size_arg(na_dim: int, input_size: int | Sequence[int]) -> tuple[int, ...]:
    """The extent of each axis of a map."""
    return _positive("input_size", na_dim, input_size)


def check_causal_arg(na_dim: int, is_causal: bool | Sequence[bool] | None) -> tuple[bool, ...]:
    """is_causal for each axis; None means False."""
    return tuple(bool(x) for x in bools("is_causal", is_causal, check_rank(na_dim)))


def check_all_args(na_dim: int, kernel_size: Any, *others: Any, **named: Any) -> Any:
    """The window arguments, each made into a tuple.

    As in NATTEN 0.17, ``check_all_args(na_dim, kernel_size, dilation, is_causal)`` returns
    kernel_size, dilation and is_causal. As in 0.20, with a stride before the dilation or by
    keyword, it returns kernel_size, stride, dilation and is_causal.
    """
    names = ["dilation", "is_causal"]
    if len(others) + len(named) == 3:
        names.insert(0, "stride")
    given = dict(zip(names, others, strict=False))
    if len(others) + len(named) != len(names) or set(given) | set(named) != set(names):
        raise NattenTypeError(
            "check_all_args takes na_dim, kernel_size, dilation and is_causal, or na_dim, "
            f"kernel_size, stride, dilation and is_causal; got {2 + len(others)} positional "
            f"arguments and {sorted(named)}."
        )
    given.update(named)
    stride = (check_stride_arg(na_dim, given["stride"]),) if "stride" in given else ()
    sizes = check_kernel_size_arg(na_dim, kernel_size)
    if stride:
        for axis, (step, size) in enumerate(zip(*stride, sizes, strict=True)):
            if step > size:
                raise NattenError(
                    f"stride must be at most kernel_size, got {step} and {size} on axis {axis}."
                )
    return (
        sizes,
        *stride,
        check_dilation_arg(na_dim, given["dilation"]),
        check_causal_arg(na_dim, given["is_causal"]),
    )


def check_tiling_config(na_dim: int, tiling_config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A pair of tiles, queries and keys, each with an entry for each axis."""
    if not isinstance(tiling_config, (tuple, list)) or len(tiling_config) != 2:
        raise NattenTypeError(f"A tiling is a pair of tuples of integers, got {tiling_config!r}.")
    query, key = tiling_config
    return _positive("the query tile", na_dim, query), _positive("the key tile", na_dim, key)


def check_backward_tiling_config(na_dim: int, tiling_config: Any) -> tuple[Any, ...]:
    """Tiles of queries and keys, splits of the keys, and whether torch sums output times gradient
    of output: three tuples with an entry for each axis, and a bool."""
    if not isinstance(tiling_config, (tuple, list)) or len(tiling_config) != 4:
        raise NattenTypeError(
            f"A tiling of a backward is three tuples of integers and a bool, got {tiling_config!r}."
        )
    query, key, splits, with_torch = tiling_config
    if not isinstance(with_torch, bool):
        raise NattenTypeError(f"The last entry of the tiling must be a bool, got {with_torch!r}.")
    tiles = check_tiling_config(na_dim, (query, key))
    return *tiles, _positive("the number of splits", na_dim, splits), with_torch


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """How many additional tokens there are, for heads-first queries or keys and additional keys
    ``[batch, heads, tokens, head_dim]``."""
    if additional_keys is None:
        return 0
    if check_tensor("additional_keys", additional_keys).dim() != 4:
        raise NattenError(f"additional_keys must have rank 4, got {additional_keys.dim()}.")
    batch, heads, tokens, head_dim = additional_keys.shape
    shape = check_tensor("input_tensor", input_tensor).shape
    expected = (*shape[:2], *shape[-1:])
    if (batch, heads, head_dim) != expected:
        raise NattenError(
            f"additional_keys has batch, heads and head_dim {(batch, heads, head_dim)}, but query "
            f"has {expected}."
        )
    return int(tokens)


def check_additional_values(
    attn: Tensor,
    additional_values: Tensor | None,
    value: Tensor,
    expected_attn_weights: int,
) -> int:
    """How many additional tokens there are, for heads-first weights and values and additional
    values ``[batch, heads, tokens, value_dim]``; expected_attn_weights are those of the window."""
    tokens = 0
    if additional_values is not None:
        if check_tensor("additional_values", additional_values).dim() != 4:
            raise NattenError(f"additional_values must have rank 4, got {additional_values.dim()}.")
        batch, heads, tokens, dim = additional_values.shape
        shape = check_tensor("value", value).shape
        expected = (*shape[:2], *shape[-1:])
        if (batch, heads, dim) != expected:
            raise NattenError(
                f"additional_values has batch, heads and head_dim {(batch, heads, dim)}, but value "
                f"has {expected}."
            )
    if check_tensor("attn", attn).shape[-1:] != (expected_attn_weights + tokens,):
        raise NattenError(
            f"Expected {expected_attn_weights + tokens} attention weights per token, got "
            f"attn.shape[-1]={attn.shape[-1] if attn.dim() else None}."
        )
    return int(tokens)
