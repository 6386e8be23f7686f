"""Methods: each a frozen config and one composition of a search and a loss."""

from .baselines import SVDD, SVDDMC, BestOfN, Pretrained, Real
from .dav import DAV, DAVKL
from .fav import FAV
from .policy import DDPO, DPOK, GRPO
from .preference import DPO
from .weighted import RWR, VIDD, VMPO

__all__ = [
    "DAV",
    "DAVKL",
    "DDPO",
    "DPO",
    "DPOK",
    "FAV",
    "GRPO",
    "RWR",
    "SVDD",
    "SVDDMC",
    "VIDD",
    "VMPO",
    "BestOfN",
    "Pretrained",
    "Real",
]
