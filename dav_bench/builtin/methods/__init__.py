"""Methods: each a frozen config and one composition of a search and a loss."""

from .baselines import SVDD, BestOfN, Pretrained, Real
from .dav import DAV, DAVKL

__all__ = ["DAV", "DAVKL", "SVDD", "BestOfN", "Pretrained", "Real"]
