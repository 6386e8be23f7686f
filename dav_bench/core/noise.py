"""Stateless randomness: what a sample draws depends on its own key, never on its neighbours.

A global generator ties every sample to the batch it sits in: another batch size, another order or a resume
gives other samples.  Here each sample owns a 64-bit key, and each purpose (a denoising step, a child of a
search) folds a tag into it.  Numbers are a hash of key and counter (the SplitMix64 finaliser), so there is no
state to store and a resumed run needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 reads them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _M1) & _MASK
    z = ((z ^ (z >> 27)) * _M2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_M1)
    z = (z ^ _shift(z, 27)) * _signed(_M2)
    return z ^ _shift(z, 31)


@dataclass(frozen=True)
class Noise:
    """One independent stream per sample.  Using a value twice gives the same numbers: `fold` before each use."""

    keys: Tensor
    """(n,) int64."""

    @classmethod
    def of(cls, seed: int, n: int, start: int = 0, device: str | torch.device = "cpu") -> Noise:
        """Streams of samples start … start + n − 1; a larger n leaves the first ones as they were."""
        # seed 0 must not mix to 0: counters k and 2k would then be a number and its double, which the hash often keeps
        counter = torch.arange(start + 1, start + n + 1, dtype=torch.int64, device=device)
        return cls(_mix(_signed(_mix_int(seed + _GOLDEN)) + counter * _signed(_GOLDEN)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice | Tensor) -> Noise:
        return Noise(self.keys[index])

    def fold(self, *tags: int) -> Noise:
        """The child stream named by `tags`."""
        keys = self.keys
        for tag in tags:
            keys = _mix(keys ^ _signed(_mix_int(tag + _GOLDEN)))
        return Noise(keys)

    def repeat(self, m: int) -> Noise:
        """(n * m,) streams, sample-major: those of the m children of each sample."""
        # negative, so that no child is the stream of a tag of `fold`
        child = -torch.arange(1, m + 1, dtype=torch.int64, device=self.keys.device) * _signed(_GOLDEN)
        return Noise(_mix(self.keys[:, None] ^ _mix(child)).flatten())

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=self.keys.device)
        return _mix(self.keys[:, None] + counter * _signed(_GOLDEN)).view(len(self), *shape)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, *shape) in the open interval (0, 1)."""
        digits = 52 if dtype == torch.float64 else 23  # one less than the mantissa, so that k + 1/2 is exact
        return (_shift(self._bits(shape), 64 - digits).to(dtype) + 0.5) * 2.0**-digits

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, *shape) standard normal, by inversion in float64 (tails to 8 standard deviations)."""
        return torch.special.ndtri(self.uniform(*shape, dtype=torch.float64)).to(dtype)

    def gumbel(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, *shape) standard Gumbel."""
        return -(-self.uniform(*shape, dtype=dtype).log()).log()

    def categorical(self, logits: Tensor) -> Tensor:
        """(n,) indices drawn from softmax(`logits`), (n, k); rows of −inf only are the caller's to avoid."""
        cdf = logits.softmax(-1).cumsum(-1)
        u = self.uniform(1, dtype=logits.dtype if logits.dtype == torch.float64 else torch.float32)
        return (u >= cdf / cdf[:, -1:]).sum(-1)
