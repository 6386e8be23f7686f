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

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20)

    def text(x: float, y: float, words: str, fill: str, **more: object) -> str:
        rest = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
        return f'<text x="{x:.1f}" y="{y}" fill="{fill}"{rest}>{html.escape(words)}</text>'

    def rule(x: float, top: float, bottom: float, colour: str, **more: object) -> str:
        rest = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
        return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{colour}"{rest}/>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" font-family="sans-serif">',
        "<title>Held-out reward of the samples of each row</title>",
        f'<rect width="{WIDTH}" height="{tall}" fill="#ffffff"/>',
        text(LEFT, 20, "held-out HepG2 specificity (log-odds) of all evaluation samples", "#333"),
        rule(at(q90), TOP - 14, tall - 34, "#b45309", stroke_dasharray="4 4"),
        text(at(q90) + 6, TOP - 4, "90th percentile of real elements", "#b45309", font_size=12),
    ]
    curves = {label: density(np.asarray(held[label]), grid) for label in labels}
    peak = max(curve.max() for curve in curves.values())
    for k, label in enumerate(labels):
        base = TOP + ROW * (k + 1)
        y = base - curves[label] / peak * (ROW - 12)
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = "#64748b" if label in ("real", "pretrained") else "#2563eb"
        shape = f"{x[0]:.1f},{base} {line} {x[-1]:.1f},{base}"
        out += [
            text(LEFT - 12, base - 6, label, "#111", text_anchor="end"),
            f'<polygon points="{shape}" fill="{colour}" fill-opacity=".35" stroke="{colour}"/>',
            rule(at(float(np.median(held[label]))), base - 14, base, "#111", stroke_width=2),
        ]
    ticks = range(int(low), int(high) + 1, 2)
    out += [
        text(at(tick), tall - 14, str(tick), "#555", text_anchor="middle", font_size=12) for tick in ticks
    ]
    (ROOT / "docs" / "dna.svg").write_text("\n".join([*out, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
