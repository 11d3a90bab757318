# SPDX-License-Identifier: MIT
"""Which kernel takes a call, and why others did not."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .. import _call, _items, _ops, _preferences

_OPS = {
    f"natten::{name}": op
    for op in (*_call.OPS, *_call.MASKED_OPS)
    for name in (op.name, f"{op.name}_traced")
}


class _Listener(TorchDispatchMode):
    """Hears of every op of torch on its way."""

    def __init__(self, plans: list[str]) -> None:
        super().__init__()
        self.plans = plans

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        op = _OPS.get(func._schema.name)
        if op is not None:
            self.plans.append(_ops.explain(op, args))
        elif func._schema.name.startswith("natten::items"):
            self.plans += _items.explain(args)
        return func(*args, **(kwargs or {}))


class explain:
    """Lists the explanations of the calls made while it is entered, backward passes included.

    An explanation names, a line each, the kernels that refuse a problem and why, then the one that
    takes it, and what became of the settings of natten.context. Packed items have one each, equal
    neighbours one together. Calls run as always, a bit slower.

    Example::

        with natten.utils.explain() as plans:
            natten.functional.na2d(query, key, value, kernel_size=7)
        print(plans[0])
    """

    def __init__(self) -> None:
        self._plans: list[str] = []
        self._listener = _Listener(self._plans)

    def __enter__(self) -> list[str]:
        _preferences.refresh()
        self._listener.__enter__()
        return self._plans

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.__exit__(kind, error, trace)
