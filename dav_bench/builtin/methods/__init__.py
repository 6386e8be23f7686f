"""Methods: each a frozen config and one composition of a search and a loss."""

from .baselines import SVDD, BestOfN, Pretrained, Real
from .dav import DAV, DAVKL
from .policy import DDPO, DPOK, GRPO
from .preference import DPO
from .weighted import RWR, VIDD, VMPO

__all__ = [
    "DAV",
    "DAVKL",
    "DDPO",
    "DPO",
    "DPOK",
    "GRPO",
    "RWR",
    "SVDD",
    "VIDD",
    "VMPO",
    "BestOfN",
    "Pretrained",
    "Real",
]
