"""Named random streams: a seed depends on its name and on the axes that should matter, on nothing else."""

from __future__ import annotations

import hashlib
import json


def stream(base_seed: int, name: str, *axes: int | str) -> int:
    """Derive the seed of one stream, an integer in [0, 2**63).

    Evaluation streams leave out method and training seed, so that methods share their noise and
    comparisons are paired; training streams name seed and round.

    Args:
        base_seed: Seed of the run, or of the evaluation protocol.
        name: What the stream is for, such as "search" or "eval".
        *axes: Whatever else must change the stream, such as the round.
    """
    key = json.dumps([int(base_seed), name, *axes], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
