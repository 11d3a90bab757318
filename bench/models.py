# SPDX-License-Identifier: MIT
"""A whole model: Dinat-mini of transformers, 224 x 224, random weights, forward and forward with
backward, with this library's functions and with keys and values gathered by a table of indices.

    pip install transformers==4.53.3      the last release in which the model works
    python bench/models.py [--threads 2] [--rounds 7]

The two take turns; medians and quartiles of the wall time.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable

import machine
import torch
from contenders import Axis, compile_plain, windows_along
from transformers import DinatConfig, DinatForImageClassification
from transformers.models.dinat import modeling_dinat

OURS = {"natten": (modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav)}
HEAD = "model direction contender threads median_ms low_ms high_ms ratio rounds".split()


class Gather:
    """The unfused functions by gathering; tables are made once for each map."""

    def __init__(self, rule: ctypes.CDLL):
        self.rule = rule
        self.tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def along(self, extent: int, size: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each place the keys of its window, and their places in the bias."""
        first, _ = windows_along(Axis(extent, size, 1, dilation, 0), self.rule)
        keys = first[:, None] + torch.arange(size) * dilation
        places = torch.arange(extent)[:, None]
        return keys, (keys - places).div(dilation, rounding_mode="floor") + size - 1

    def table(self, height: int, width: int, size: int, dilation: int):
        key = (height, width, size, dilation)
        if key not in self.tables:
            y, bias_y = self.along(height, size, dilation)
            x, bias_x = self.along(width, size, dilation)
            index = y[:, None, :, None] * width + x[None, :, None, :]
            bias = bias_y[:, None, :, None] * (2 * size - 1) + bias_x[None, :, None, :]
            flat = (height * width, size * size)
            self.tables[key] = index.reshape(flat), bias.reshape(flat)
        return self.tables[key]

    def qk(self, query, key, rpb, size, dilation):
        b, h, height, width, d = query.shape
        index, bias = self.table(height, width, size, dilation)
        keys = key.reshape(b, h, -1, d)[:, :, index]
        scores = torch.einsum("bhqd,bhqwd->bhqw", query.reshape(b, h, -1, d), keys)
        scores = scores + rpb.reshape(h, -1)[:, bias]
        return scores.reshape(b, h, height, width, -1)

    def av(self, attn, value, size, dilation):
        b, h, height, width, d = value.shape
        index, _ = self.table(height, width, size, dilation)
        values = value.reshape(b, h, -1, d)[:, :, index]
        out = torch.einsum("bhqw,bhqwd->bhqd", attn.reshape(b, h, height * width, -1), values)
        return out.reshape(value.shape)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Dinat-mini with and without natten")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = DinatForImageClassification(DinatConfig()).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        gather = Gather(compile_plain(["-O3"], folder))
    contenders = {**OURS, "gather": (gather.qk, gather.av)}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(pixels).logits

    def both() -> torch.Tensor:
        model.zero_grad()
        logits = model(pixels).logits
        logits.square().sum().backward()
        return logits.detach()

    rows = []
    print(f"{machine.processor()}, {options.threads} threads, torch {torch.__version__}")
    for direction, call in {"forward": forward, "both": both}.items():
        times: dict[str, list[float]] = {name: [] for name in contenders}
        results = []
        for turn in range(options.rounds + 1):
            for name, functions in contenders.items():
                modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = functions
                if turn == 0:
                    results.append(call())
                else:
                    times[name].append(seconds(call))
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
        ours = statistics.median(times["natten"])
        for name, all_of_it in times.items():
            low, median, high = statistics.quantiles(all_of_it, n=4)
            numbers = [f"{1e3 * s:.1f}" for s in (median, low, high)]
            print(f"Dinat-mini {direction:8} {name:8} {' '.join(numbers)} ms {median / ours:.1f}x")
            ratio = f"{median / ours:.2f}"
            rows.append(
                ("Dinat-mini", direction, name, options.threads, *numbers, ratio, options.rounds)
            )
    machine.write("models", HEAD, rows)


if __name__ == "__main__":
    main()
