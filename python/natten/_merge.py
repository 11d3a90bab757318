# SPDX-License-Identifier: MIT
"""Attention over several sets of keys, put together from attention over each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._errors import NattenError, NattenTypeError


def _check(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> None:
    for name, tensors in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        if not isinstance(tensors, (list, tuple)) or not all(
            isinstance(tensor, Tensor) for tensor in tensors
        ):
            raise NattenTypeError(f"{name} must be a list of tensors, got {type(tensors)}.")
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise NattenError(
            "merge_attentions needs at least two outputs and a LSE for each, got "
            f"{len(outputs)} and {len(lse_tensors)}."
        )
    first = outputs[0]
    for i, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if output.shape != first.shape or output.dtype != first.dtype:
            raise NattenError(
                f"Outputs must look alike: outputs[{i}] is {tuple(output.shape)} of {output.dtype},"
                f" outputs[0] is {tuple(first.shape)} of {first.dtype}."
            )
        if lse.shape != first.shape[:-1]:
            raise NattenError(
                f"lse_tensors[{i}] must be {tuple(first.shape[:-1])}, as the outputs without their "
                f"channels, got {tuple(lse.shape)}."
            )
        if output.device != first.device or lse.device != first.device:
            raise NattenError(
                f"All tensors must be on one device: outputs[0] is on {first.device}, outputs[{i}] "
                f"on {output.device}, lse_tensors[{i}] on {lse.device}."
            )
        if not output.is_floating_point() or not lse.is_floating_point():
            raise NattenError(f"outputs[{i}] and lse_tensors[{i}] must be of a floating type.")


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each set.

    With out_i and lse_i of each set, lse = ln sum_i exp(lse_i) and out = sum_i exp(lse_i - lse)
    out_i (the combination step of FlashAttention-style split softmax; Dao et al., 2022). A set
    without keys has lse_i = -inf and counts nothing; if no set has keys, out is 0 and lse -inf.

    Args:
        outputs: two or more, ``[batch, tokens, heads, value_dim]`` each, or with as many axes in
            place of ``tokens`` as you like; one shape, dtype and device for all.
        lse_tensors: natural logarithms, ``[batch, tokens, heads]`` each, as ``return_lse`` gives.
        torch_compile: a hint, without effect.
        use_autograd_fix: without effect: gradients are exact, for outputs and lse_tensors alike.

    Returns:
        out, of the dtype of the outputs, and lse, float32 (float64 if an input is). Computed in
        that type. Inputs are left as they are, in backward too.

    Raises:
        NattenError: fewer than two sets, or tensors that do not fit each other.
        NattenTypeError: not lists of tensors.
    """
    _check(outputs, lse_tensors)
    dtype = torch.float32
    for tensor in (*outputs, *lse_tensors):
        dtype = torch.promote_types(dtype, tensor.dtype)
    logs = torch.stack([lse.to(dtype) for lse in lse_tensors])
    # ln 0 is -inf, but its derivative must not be NaN.
    empty = (logs == -torch.inf).all(0)
    total = logs.masked_fill(empty, 0).logsumexp(0)
    weights = (logs - total.masked_fill(empty, 0)).exp().unsqueeze(-1)
    out = weights[0] * outputs[0].to(dtype)
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        out = torch.addcmul(out, weight.expand(output.shape), output.to(dtype))
    return out.to(outputs[0].dtype), total.masked_fill(empty, -torch.inf)


def merge_with_additional(
    output_fna: Tensor, output_sdpa: Tensor, lse_fna: Tensor, lse_sdpa: Tensor
) -> Tensor:
    """The merge of NATTEN 0.17 (natten.ops): attention to a window and to additional tokens.

    Args:
        output_fna: ``[batch, *map, heads, value_dim]``.
        output_sdpa: the same, or with one axis in place of the map.
        lse_fna: ``[batch, *map, heads]``.
        lse_sdpa: the same as lse_fna, or ``[batch, heads, tokens]``, the tokens of the map in
            row-major order, as natten.ops.additional_sdpa returns it.

    Returns:
        ``[batch, *map, heads, value_dim]``.

    Raises:
        NattenError: tensors that do not fit each other.
    """
    lse = lse_sdpa if lse_sdpa.shape == lse_fna.shape else lse_sdpa.movedim(1, -1)
    if lse.numel() != lse_fna.numel() or output_sdpa.numel() != output_fna.numel():
        raise NattenError(
            "The two attentions must be of the same queries, got "
            f"{tuple(output_fna.shape)}, {tuple(output_sdpa.shape)}, {tuple(lse_fna.shape)} and "
            f"{tuple(lse_sdpa.shape)}."
        )
    outputs = [output_fna, output_sdpa.reshape(output_fna.shape)]
    return merge_attentions(outputs, [lse_fna, lse.reshape(lse_fna.shape)])[0]
