# SPDX-License-Identifier: MIT
"""Trains a small neighborhood-attention classifier on scikit-learn's 8x8 digits.

Two stages of two blocks each. In the first every pixel is a token: a block with windows of 3x3
neighbors, then one with windows of 3x3 pixels that lie two apart (dilation 2), which reach over 5x5
for the same price. The second works on 4x4 tokens of 2x2 pixels. A quarter of the images is held
out.

    python examples/digits.py [--output PICTURE.png]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from natten import NeighborhoodAttention2D
from natten.functional import na2d

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIZE, CLASSES = 8, 10
INK, WINDOW = "gray_r", "#d62728"
Array = npt.NDArray[np.float32]


class Block(nn.Module):
    """Attention over the window, then a network on every token, each added to what was there."""

    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = NeighborhoodAttention2D(
            dim, heads, kernel_size, dilation=dilation, rel_pos_bias=True
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        out: torch.Tensor = x + self.mlp(x)
        return out


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(SIZE, SIZE, 32))
        self.stage1 = nn.Sequential(Block(32, 2, 3, 1), Block(32, 2, 3, 2))
        self.narrow = nn.Conv2d(32, 64, 2, stride=2)
        self.stage2 = nn.Sequential(Block(64, 4, 3, 1), Block(64, 4, 3, 1))
        self.classify = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, CLASSES))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, 8, 8] to [batch, 8, 8, dim]."""
        embedded: torch.Tensor = self.embed(images[:, None])
        return embedded.movedim(1, -1) + self.place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[batch, 8, 8] to [batch, classes]."""
        x = self.stage1(self.tokens(images))
        x = self.narrow(x.movedim(-1, 1)).movedim(1, -1)
        scores: torch.Tensor = self.classify(self.stage2(x).mean((1, 2)))
        return scores


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Every image moved left or right by up to a pixel, so that there is more to learn from."""
    columns = torch.randint(3, (len(images), 1, 1)) + torch.arange(SIZE)
    return F.pad(images, (1, 1)).gather(2, columns.expand(-1, SIZE, -1))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    batch = 64
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for chosen in order[: len(order) // batch * batch].view(-1, batch):
                loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def attention_maps(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The weights a block gives to every token, averaged over heads: [query y, x, key y, x].

    With the unit vectors as values, attention returns its own weights.
    """
    layer = block.attention
    qkv = layer.qkv(block.norm(x)).unflatten(-1, (3, layer.num_heads, layer.head_dim))
    query, key, _ = qkv.unbind(-3)
    units = torch.eye(SIZE * SIZE).view(1, SIZE, SIZE, 1, -1).expand(-1, -1, -1, key.shape[-2], -1)
    weights: torch.Tensor = na2d(
        query,
        key,
        units,
        layer.kernel_size,
        dilation=layer.dilation,
        rpb=layer.rpb,
        scale=layer.scale,
    )
    return weights.mean(-2).view(SIZE, SIZE, SIZE, SIZE)


def draw_window(axes: Axes, image: Array, weights: Array, query: tuple[int, int]) -> None:
    """The image, with the query's window framed and shaded by weight."""
    axes.imshow(image, cmap=INK, vmin=0, vmax=1, alpha=0.5)
    for y, x in np.argwhere(weights > 0):
        share = weights[y, x] / weights.max()
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=WINDOW, alpha=0.75 * share))
        corner = x - 0.46, y - 0.46
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=WINDOW, linewidth=1))
    axes.plot(query[1], query[0], "o", color="black", markersize=4)


@torch.no_grad()
def draw(model: Classifier, images: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    queries = [(3, 3), (4, 5), (0, 4)]
    shown = [int((labels == digit).nonzero()[0]) for digit in (3, 5, 8)]
    columns = 1 + 2 * len(queries)
    figure, grid = plt.subplots(len(shown), columns, figsize=(1.55 * columns, 1.8 * len(shown)))
    for row, index in zip(grid, shown, strict=True):
        image = images[index]
        guess = int(model(image[None]).argmax())
        row[0].imshow(image, cmap=INK, vmin=0, vmax=1)
        row[0].set_title(f"a {int(labels[index])}, taken for a {guess}", fontsize=9)
        x = model.tokens(image[None])
        one, two = model.stage1
        assert isinstance(one, Block) and isinstance(two, Block)
        first, second = attention_maps(one, x), attention_maps(two, one(x))
        for i, query in enumerate(queries):
            for j, (maps, name) in enumerate([(first, "3x3"), (second, "3x3, dilation 2")]):
                axes = row[1 + 2 * i + j]
                draw_window(axes, image.numpy(), maps[query].numpy(), query)
                axes.set_title(name, fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.tight_layout(pad=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"windows and attention maps: {path}")


def main() -> None:
    arguments = argparse.ArgumentParser(description="classify digits by neighborhood attention")
    arguments.add_argument(
        "--output", default=Path("out/digits.png"), type=Path, help="where to put the picture"
    )
    arguments.add_argument("--epochs", type=int, default=15)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps are too small for more
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    model = Classifier()
    start = time.perf_counter()
    train(model, parts[0], parts[2], options.epochs)
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = int((model(parts[1]).argmax(-1) == parts[3]).sum())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{right} of {len(parts[3])} held-out digits right: {100 * right / len(parts[3]):.1f} % "
        f"({count} parameters, {options.epochs} epochs, {seconds:.0f} s)"
    )
    draw(model, parts[1], parts[3], options.output)


if __name__ == "__main__":
    main()
