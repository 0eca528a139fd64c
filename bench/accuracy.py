# SPDX-License-Identifier: Apache-2.0
"""Whether an output is right: sampled rows against float64, as a peer's are, and the whole against that peer's."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from suites import Cell

SAMPLED_HEADS, SAMPLED_ROWS = 12, 64  # (batch, head) pairs, and queries of each, that are held against float64


@dataclass(frozen=True)
class Sample:
    """Rows of a cell's output in float64: for each entry of `places` a head and rows, counted over all sequences."""

    places: list[tuple[int, torch.Tensor]]
    exact: torch.Tensor  # (sampled rows, head_dim)

    def take(self, out: torch.Tensor) -> torch.Tensor:
        packed = out.flatten(0, 1)
        return torch.cat([packed[rows, h] for h, rows in self.places]).double()

    def errors(self, out: torch.Tensor) -> dict[str, float]:
        """Largest error and relative Frobenius error of an output (batch, sequence, heads, head_dim)."""
        difference = self.take(out) - self.exact
        return {
            "max_error": difference.abs().max().item(),
            "relative_error": (difference.norm() / self.exact.norm()).item(),
        }


def sample(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sample:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    starts = [(0, 0), *cell.sequences]
    starts_q, starts_k = (list(itertools.accumulate(counts)) for counts in zip(*starts, strict=True))
    every = len(cell.sequences) * cell.heads
    # The first and the last, and others at random: an error at the end of the grid shows.
    chosen = {0, every - 1, *torch.randint(every, (SAMPLED_HEADS,), generator=generator).tolist()}
    places, outputs = [], []
    for b, h in (divmod(i, cell.heads) for i in sorted(chosen)):
        queries, keys = cell.sequences[b]
        picked = {0, queries - 1, *torch.randint(queries, (SAMPLED_ROWS,), generator=generator).tolist()}
        rows = torch.tensor(sorted(picked), device=q.device)
        places.append((h, starts_q[b] + rows))
        own, head_k = slice(starts_k[b], starts_k[b] + keys), h // (cell.heads // cell.kv_heads)
        score = q[starts_q[b] + rows, h].double() @ k[own, head_k].double().T / math.sqrt(cell.head_dim)
        if cell.causal:
            distance = rows[:, None] + (keys - queries) - torch.arange(keys, device=q.device)
            window = keys if cell.window is None else cell.window
            score.masked_fill_((distance < 0) | (distance > window), -math.inf)
        outputs.append(torch.softmax(score, dim=-1) @ v[own, head_k].double())
    return Sample(places, torch.cat(outputs))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def verdict(ours: dict[str, float], yardstick: dict[str, float], difference: float) -> str:
    """Empty when FlashCore's errors are within the standard, else what is wrong. Written so that a NaN is wrong."""
    if not ours["max_error"] <= 2 * yardstick["max_error"] + 1e-5:
        return f"largest error {ours['max_error']:.2e}, the yardstick's {yardstick['max_error']:.2e}"
    if not ours["relative_error"] <= 1.25 * yardstick["relative_error"] + 1e-6:
        return f"relative error {ours['relative_error']:.2e}, the yardstick's {yardstick['relative_error']:.2e}"
    # Two results that are both within the standard differ by no more than the sum of their errors; rows vary.
    allowed = 4 * (ours["relative_error"] + yardstick["relative_error"]) + 1e-6
    if not difference <= allowed:
        return f"the whole output differs from the yardstick's by {difference:.2e}, more than {allowed:.2e}"
    return ""
