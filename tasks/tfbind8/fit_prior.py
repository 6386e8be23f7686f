"""Fit the prior of the task `tfbind8`: a Markov chain of order 3 on human regulatory elements.

Counts of all 4-mers of the training elements of the task `dna` (all chromosomes but 1 and 2), on both strands;
the rarest is seen thousands of times, so nothing is smoothed.  Writes prior.npz: `start` (4, 4, 4), the law of the
first three bases, `follow` (4, 4, 4, 4), of a base after the three before it, and `counts` (256,), from which both
follow.  Prints bits per base of 8-mers of chromosome 2 under chains of several orders: what the order leaves.

    python tasks/tfbind8/fit_prior.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ORDER = 3
TEST, VALIDATION = 1, 2


def words(x: np.ndarray, k: int) -> np.ndarray:
    """Numbers (N, L - k + 1) of the k-mers of bases (N, L), first base most significant."""
    length = x.shape[1] - k + 1
    return sum(x[:, j : j + length].astype(np.int64) * 4 ** (k - 1 - j) for j in range(k))


def counts(x: np.ndarray, k: int) -> np.ndarray:
    """(4^k,) counts of k-mers of bases (N, L) and their reverse complements."""
    both = np.concatenate([x, 3 - x[:, ::-1]])
    return np.bincount(words(both, k).ravel(), minlength=4**k)


def laws(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Law of the first k bases (4^k,) and of the next (4^k, 4) from counts of (k + 1)-mers."""
    table = count.reshape(-1, 4)
    context = table.sum(1)
    return context / context.sum(), table / context[:, None]


def bits(x: np.ndarray, count: np.ndarray, k: int, length: int = 8) -> float:
    """Bits per base of all `length`-mers of bases (N, L) under the chain of order k."""
    start, follow = laws(count)
    total = np.zeros(x.shape[1] - length + 1)
    for at in range(x.shape[1] - length + 1):
        window = x[:, at : at + length]
        nll = -np.log2(start[words(window, k)[:, 0]]) if k else np.zeros(len(x))
        total[at] = (nll - np.log2(follow.reshape(-1)[words(window, k + 1)]).sum(1)).mean()
    return float(total.mean() / length)


def main() -> None:
    with np.load(HERE.parent / "dna" / "dhs_200bp.npz") as data:
        x, chrom = data["sequence"], data["chrom"]
    train, valid = x[~np.isin(chrom, (TEST, VALIDATION))], x[chrom == VALIDATION]
    for k in range(7):
        print(f"order {k}: {bits(valid, counts(train, k + 1) + 0.5, k):.4f} bits per base on chromosome 2")
    count = counts(train, ORDER + 1)
    start, follow = laws(count)
    np.savez_compressed(
        HERE / "prior.npz",
        counts=count,
        start=start.reshape((4,) * ORDER),
        follow=follow.reshape((4,) * (ORDER + 1)),
    )
    print(f"order {ORDER}: {len(train):,} elements, {count.sum():,} 4-mers, the rarest {count.min():,} times")


if __name__ == "__main__":
    main()
