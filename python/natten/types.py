# SPDX-License-Identifier: MIT
"""Names for types of arguments, those of NATTEN 0.17 and of 0.20 and later.

``DimensionNDType`` is an integer for each of N axes, ``CausalArgNDType`` a bool; ``...OrDed`` also
allows one for all ("deduced").
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._knobs import KernelSchedule as KernelSchedule
from ._window import bools, check_rank, ints

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]

Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType

DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
DimensionTypeOrDed = int | DimensionType
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType

#: Queries and keys of a tile of a forward kernel; of a backward kernel with splits of the keys, and
#: whether torch takes the sums of the output and its gradient.
FnaTileShapeType = tuple[DimensionType, DimensionType]
FnaForwardConfigType = FnaTileShapeType
FnaBackwardConfigType = tuple[DimensionType, DimensionType, DimensionType, bool]

#: A nested tensor, or a list of its items.
ListOrNestedTensor = list[Tensor] | Tensor


def create_dim_from_int(na_dim: int, value: int) -> Any:
    """`value` for each of na_dim axes."""
    return ints("value", value, check_rank(na_dim))


def create_causal_arg_from_bool(na_dim: int, value: bool) -> Any:
    """`value` for each of na_dim axes."""
    return tuple(bool(x) for x in bools("value", value, check_rank(na_dim)))
