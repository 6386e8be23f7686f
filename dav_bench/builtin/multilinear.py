"""Functions of all sequences of one length, extended to relaxed ones: the expectation under independent positions.

A relaxed sequence is a law for each position, (B, L, V); the extension of f is Σ_s f(s) Π_l x[l, s_l], equal to f on
one-hot rows and linear in each row, so it has a gradient.  Halves of the sequence are expanded and met by one matrix
product, which costs V^L multiplications a sequence and no more memory than V^(L/2) numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def letters(vocab: int, length: int) -> Tensor:
    """(V^L, L) all sequences in the order of their number, first letter most significant."""
    powers = vocab ** torch.arange(length - 1, -1, -1)
    return torch.arange(vocab**length)[:, None] // powers % vocab


def outer(rows: Tensor) -> Tensor:
    """(B, V^L) products Π_l rows[:, l, s_l] for every sequence s; rows: (B, L, V)."""
    out = rows[:, 0]
    for row in rows[:, 1:].unbind(1):
        out = (out[:, :, None] * row[:, None]).flatten(1)
    return out


def fold(values: Tensor, vocab: int, length: int) -> Tensor:
    """(V^L,) values of all sequences as the matrix (V^(L // 2), V^(L - L // 2)) that `contract` takes."""
    return values.view(vocab ** (length // 2), -1)


def contract(table: Tensor, rows: Tensor) -> Tensor:
    """(B,) multilinear extension of a folded table at rows (B, L, V)."""
    half = rows.shape[1] // 2
    if not half:
        return rows[:, 0] @ table[0]
    return ((outer(rows[:, :half]) @ table) * outer(rows[:, half:])).sum(-1)
