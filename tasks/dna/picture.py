"""Draws docs/dna.svg from the published board: the held-out reward of every sample, row by row.

    python tasks/dna/picture.py
"""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np

from dav_bench.report.published import load_published

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("real", "pretrained", "best-of-n", "svdd", "dav", "dav+tree")
WIDTH, LEFT, ROW, TOP = 760, 130, 74, 46


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density, Silverman's bandwidth."""
    h = 1.06 * values.std() * len(values) ** -0.2
    return np.exp(-0.5 * ((grid[:, None] - values) / h) ** 2).mean(1) / h


def main() -> None:
    rows, _ = load_published(ROOT / "results" / "leaderboards" / "dna.parquet")
    held: dict[str, list[float]] = {}
    for row in rows:
        held.setdefault(row.label, []).extend(row.samples["reward.heldout"])
    labels = [label for label in ROWS if label in held]
    everything = np.concatenate([np.asarray(held[label]) for label in labels])
    low, high = np.floor(np.quantile(everything, 0.002)), np.ceil(np.quantile(everything, 0.998))
    grid = np.linspace(low, high, 300)
    x = LEFT + (grid - low) / (high - low) * (WIDTH - LEFT - 20)
    q90 = json.loads((ROOT / "tasks" / "dna" / "scales.json").read_text())["test"]["heldout"]["q90"]
    tall = TOP + ROW * len(labels) + 40
    mark = LEFT + (q90 - low) / (high - low) * (WIDTH - LEFT - 20)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" font-family="sans-serif" font-size="14">',
        "<title>Held-out reward of the samples of each row</title>",
        f'<rect width="{WIDTH}" height="{tall}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" fill="#333">held-out HepG2 specificity (log-odds) of 256 samples a seed</text>',
        f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="{TOP - 14}" y2="{tall - 34}" stroke="#b45309" stroke-dasharray="4 4"/>',
        f'<text x="{mark + 6:.1f}" y="{TOP - 4}" fill="#b45309" font-size="12">90th percentile of real elements</text>',
    ]
    peak = max(density(np.asarray(held[label]), grid).max() for label in labels)
    for k, label in enumerate(labels):
        base = TOP + ROW * (k + 1)
        y = base - density(np.asarray(held[label]), grid) / peak * (ROW - 12)
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = "#64748b" if label in ("real", "pretrained") else "#2563eb"
        median = LEFT + (np.median(held[label]) - low) / (high - low) * (WIDTH - LEFT - 20)
        out += [
            f'<text x="{LEFT - 12}" y="{base - 6}" text-anchor="end" fill="#111">{html.escape(label)}</text>',
            f'<polygon points="{x[0]:.1f},{base} {line} {x[-1]:.1f},{base}" fill="{colour}" fill-opacity=".35" stroke="{colour}"/>',
            f'<line x1="{median:.1f}" x2="{median:.1f}" y1="{base - 14}" y2="{base}" stroke="#111" stroke-width="2"/>',
        ]
    for tick in range(int(low), int(high) + 1, 2):
        at = LEFT + (tick - low) / (high - low) * (WIDTH - LEFT - 20)
        out.append(f'<text x="{at:.1f}" y="{tall - 14}" text-anchor="middle" fill="#555" font-size="12">{tick}</text>')
    (ROOT / "docs" / "dna.svg").write_text("\n".join([*out, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
