# SPDX-License-Identifier: MIT
"""Removes noise from a photograph with a single call of neighborhood attention.

Non-local means replaces every pixel by an average of the pixels around it, weighted by how alike
the small patches around them are: exp(-|p - p'|^2 / h^2). That is attention with patches as queries
and keys, and pixels as values, because

    -|p - p'|^2 = (p, 1) . (2 p', -|p'|^2) - |p|^2

and the last term is the same for all keys of a query. Queries and keys have 16 channels, values 3.

    python examples/denoise.py [--image china.jpg|flower.jpg] [--output PICTURE.png]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from natten.functional import na2d

WINDOW = 21  # pixels looked at, along each side
PATCH = 5
CHANNELS = 15  # of a patch's 75 numbers; with the 1 beside them a multiple of 8
STRENGTH = 0.45  # h, in units of how far two patches are apart that differ by noise alone


def patches(image: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
    """For each pixel the patch around it, [height, width, channels], and the squared distance that
    noise alone puts between two patches."""
    height, width, colors = image.shape
    reach = PATCH // 2
    padded = F.pad(image.permute(2, 0, 1)[None], (reach,) * 4, mode="reflect")
    numbers = F.unfold(padded, PATCH)[0].T
    across = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * 1.2**2))
    importance = (across[:, None] * across).flatten().repeat(colors)
    numbers = (numbers - numbers.mean(0)) * importance.sqrt()
    # The directions in which patches differ most: nearly all of the picture, little of the noise.
    _, directions = torch.linalg.eigh(numbers.T @ numbers)
    numbers = numbers @ directions[:, -CHANNELS:]
    return numbers.view(height, width, CHANNELS), 2 * sigma**2 * float(importance.sum())


def non_local_means(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    patch, noise = patches(noisy, sigma)
    h2 = STRENGTH**2 * noise
    norm = patch.square().sum(-1, keepdim=True)
    query = torch.cat([patch, torch.ones_like(norm)], -1)
    key = torch.cat([2 * patch, -norm], -1) / h2
    # [height, width, channels] -> [batch, height, width, heads, channels]
    query, key, value = (t[None, :, :, None] for t in (query, key, noisy))
    out, lse = na2d(query, key, value, kernel_size=WINDOW, scale=1.0, return_lse=True)
    # A pixel is too much like itself, noise and all. The log-sum-exp tells the weight it had; give
    # it what a pixel of the same color with other noise would get.
    own = (norm / h2 - lse[0]).exp()
    fair = own * math.exp(-noise / h2)
    result: torch.Tensor = (out[0, :, :, 0] - (own - fair) * noisy) / (1 - own + fair)
    return result.clamp(0, 1)


def decibels(image: torch.Tensor, truth: torch.Tensor) -> float:
    return -10 * math.log10((image - truth).square().mean().item())


def picture(panels: list[tuple[str, torch.Tensor]], crop: tuple[slice, slice]) -> Image.Image:
    """Whole images side by side, and below each a part of it, twice as large."""
    height, width, _ = panels[0][1].shape
    zoom = 2 * (crop[0].stop - crop[0].start)
    sheet = Image.new("RGB", ((width + 8) * len(panels) - 8, height + zoom + 32), "white")
    for i, (title, image) in enumerate(panels):
        left = i * (width + 8)
        pixels = (image * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(pixels), (left, 24))
        detail = Image.fromarray(np.ascontiguousarray(pixels[crop]))
        sheet.paste(detail.resize((width, zoom), Image.Resampling.NEAREST), (left, height + 32))
        ImageDraw.Draw(sheet).text((left + 4, 2), title, fill="black", font_size=18)
    return sheet


def main() -> None:
    arguments = argparse.ArgumentParser(description="non-local means by neighborhood attention")
    arguments.add_argument("--image", default="flower.jpg", choices=["china.jpg", "flower.jpg"])
    arguments.add_argument(
        "--output", default=Path("out/denoise.png"), type=Path, help="where to put the picture"
    )
    arguments.add_argument("--sigma", type=float, default=0.1, help="noise, of a range of 1")
    options = arguments.parse_args()
    torch.manual_seed(0)
    truth = torch.tensor(load_sample_image(options.image)) / 255
    noisy = truth + options.sigma * torch.randn(truth.shape)
    seconds = math.inf
    with torch.inference_mode(), tqdm(total=3, desc="denoising", unit="call") as progress:
        for _ in range(3):
            start = time.perf_counter()
            clean = non_local_means(noisy, options.sigma)
            seconds = min(seconds, time.perf_counter() - start)
            progress.update()
    before, after = decibels(noisy.clamp(0, 1), truth), decibels(clean, truth)
    height, width, _ = truth.shape
    dense = (height * width) ** 2 * 4
    print(
        f"{options.image}, {width}x{height} pixels, a window of {WINDOW}x{WINDOW}: "
        f"PSNR {before:.2f} dB before, {after:.2f} dB after, in {seconds:.2f} s "
        f"(patches included, best of three)"
    )
    print(f"the scores of dense attention alone would take {dense / 1e9:.0f} GB")
    panels = [
        ("the photograph", truth),
        (f"with noise: {before:.1f} dB", noisy.clamp(0, 1)),
        (f"after one call: {after:.1f} dB", clean),
    ]
    middle = slice(150, 150 + width // 4), slice(width // 4, width // 4 + width // 2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture(panels, middle).save(options.output)
    print(f"side by side: {options.output}")


if __name__ == "__main__":
    main()
