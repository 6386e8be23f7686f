"""Measure the shipped models of the task `dna` and write measured.json and scales.json, which the cards quote.

python tasks/dna/measure.py           # chromosome 2 only
python tasks/dna/measure.py --test    # chromosome 1 as well: once, when nothing will be changed any more
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dhs import CELLS, HEPG2, HERE, TEST, VALIDATION, Elements, Markov, auroc, one_hot
from scipy.stats import spearmanr
from torch import Tensor, nn
from train_accessibility import ORDER, logits, negatives
from train_generator import bound
from train_oracles import scores

from dav_bench.builtin.models.mdlm import network
from dav_bench.builtin.rewards.dna import build_accessibility, build_heldout, build_specificity
from dav_bench.builtin.weights import load

DRAWS = 32
"""Masks drawn for each sequence in the bound."""
ORDERS = (0, 1, 3, 5, 7, 9)
"""Of the Markov models the generator is compared with."""
REWARDS = {"train": build_specificity, "heldout": build_heldout}


def generators() -> list[str]:
    """Stems of the shipped generators."""
    return sorted(path.stem for path in (HERE / "weights").glob("generator*.safetensors"))


def speed(net: nn.Module, width: int, threads: int, rows: int = 128, seconds: float = 1.0) -> int:
    """Sequences a second in fp32, the best of five tries.

    One thread is timed by its processor time, so that other work on the machine counts little; more by the clock.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    x = one_hot(torch.randint(0, width, (rows, 200)), width)
    torch.set_num_threads(threads)
    best = 0.0
    with torch.inference_mode():
        net(x)
        for _ in range(5):
            start, n = clock(), 0
            while clock() - start < seconds:
                net(x)
                n += rows
            best = max(best, n / (clock() - start))
    torch.set_num_threads(os.cpu_count() or 1)
    return round(best)


def spread(values: Tensor) -> dict[str, float]:
    """Median and tenths of rewards."""
    q10, median, q90 = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"median": round(median, 4), "q10": round(q10, 4), "q90": round(q90, 4)}


def measure_markov(data: Elements, chrom: int) -> dict[str, float]:
    """Bits per base of Markov models with reverse complements on one chromosome."""
    fitted = {order: Markov(data.x[data.train], order) for order in ORDERS}
    return {str(order): round(m.bits(data.x[data.on(chrom)]).mean().item(), 4) for order, m in fitted.items()}


def measure_generator(name: str, data: Elements, chrom: int) -> dict[str, float]:
    """Bound on bits per base of one chromosome, with the Monte-Carlo standard error."""
    bits, error = bound(network(name)[0], data.x[data.on(chrom)], DRAWS)
    print(
        f"{name} chromosome {chrom}: at most {bits:.4f} bits per base, standard error {error:.5f}", flush=True
    )
    return {"bits_per_base": round(bits, 4), "standard_error": round(error, 5), "draws": DRAWS}


def measure_rewards(data: Elements, chrom: int) -> dict[str, Any]:
    """AUROC of HepG2 against the rest, rank correlation of the two rewards, and their spread on HepG2 elements."""
    rows = data.on(chrom)
    own = data.y[rows] == HEPG2
    found = {role: scores(build(), data.x[rows]) for role, build in REWARDS.items()}
    return {
        "auroc": {role: round(auroc(value, own), 4) for role, value in found.items()},
        "spearman": {
            "all elements": round(float(spearmanr(found["train"], found["heldout"]).statistic), 4),
            "HepG2 elements": round(
                float(spearmanr(found["train"][own], found["heldout"][own]).statistic), 4
            ),
        },
        "hepg2": {role: spread(value[own]) for role, value in found.items()},
    }


@torch.inference_mode()
def measure_accessibility(data: Elements, chrom: int) -> dict[str, Any]:
    """How the HepG2 output tells HepG2 elements from each kind of negative, and what is called open."""
    model = build_accessibility()
    rows = data.on(chrom)
    markov = Markov(data.x[data.train], ORDER)
    shuffled, drawn = negatives(data.x[rows], markov, np.random.default_rng(100))
    kinds = {"shuffled": shuffled, "markov": drawn, "all": torch.cat([shuffled, drawn])}
    real = logits(model.both, data.x[rows])[:, HEPG2]
    fake = {kind: logits(model.both, x)[:, HEPG2] for kind, x in kinds.items()}
    own = real[data.y[rows] == HEPG2]
    return {
        "auroc of HepG2 elements": {
            kind: round(auroc(torch.cat([own, f]), torch.arange(len(own) + len(f)) < len(own)), 4)
            for kind, f in fake.items()
        },
        "called open": {
            **{
                f"{cell} elements": share(real[data.y[rows] == i] > model.threshold)
                for i, cell in enumerate(CELLS)
            },
            **{f"{kind} negatives": share(f > model.threshold) for kind, f in fake.items()},
        },
        "negatives": len(fake["all"]),
    }


def share(hit: Tensor) -> float:
    """Share of true entries."""
    return round(hit.float().mean().item(), 4)


def of_weights() -> dict[str, Any]:
    """Size, seconds of training and speed of each network."""
    nets: dict[str, tuple[nn.Module, int]] = {name: (network(name)[0], 5) for name in generators()}
    nets |= {"specificity": (build_specificity(), 4), "specificity-heldout": (build_heldout(), 4)}
    nets["accessibility"] = (build_accessibility(), 4)
    return {
        name: {
            "parameters": sum(p.numel() for p in net.parameters()),
            "bytes": (HERE / "weights" / f"{name}.safetensors").stat().st_size,
            "training_seconds": load(name)[1]["seconds"],
            "sequences_per_second": {"1 thread": speed(net, width, 1), "2 threads": speed(net, width, 2)},
        }
        for name, (net, width) in nets.items()
    }


def on(data: Elements, chrom: int) -> dict[str, Any]:
    """Everything measured on one chromosome."""
    return {
        "markov_bits_per_base": measure_markov(data, chrom),
        "generators": {name: measure_generator(name, data, chrom) for name in generators()},
        "rewards": measure_rewards(data, chrom),
        "accessibility": measure_accessibility(data, chrom),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file as a whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", action="store_true", help="measure chromosome 1 as well")
    args = parser.parse_args()
    data = Elements()
    found: dict[str, Any] = {"models": of_weights(), "validation": on(data, VALIDATION)}
    scales: dict[str, Any] = {
        "of": "real HepG2 elements of chromosome 2",
        **found["validation"]["rewards"]["hepg2"],
    }
    if args.test:
        found["test"] = on(data, TEST)
        scales["test"] = {"of": "real HepG2 elements of chromosome 1", **found["test"]["rewards"]["hepg2"]}
    write(HERE / "measured.json", found)
    write(HERE / "scales.json", scales)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
