"""DPO on denoising errors: Diffusion-DPO (arXiv 2311.12908) and its form for masked tokens (arXiv 2503.08295)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dav_bench.core.method import Method, Training
from dav_bench.errors import DavBenchError, ExitCode, near

if TYPE_CHECKING:
    from torch import Tensor

    from dav_bench.core import Searcher

LETTERS = "ACGT"
_COLUMNS = ("winner", "loser")


@dataclass(frozen=True)
class DPO(Training):
    """Pairs of samples labelled by the reward, or from a file; the model learns to denoise winners better."""

    beta: float | None = None
    """B on Gaussian noise, inverse temperature on tokens; none: 5000 (released code) and 1."""
    reduce: Literal["paper", "sum", "mean"] = "paper"
    """Errors over dimensions: mean on Gaussian noise and sum on tokens (as published), or one for both."""
    draws: int = 1
    """Noisy states of each sample in each pass."""
    average: Literal["loss", "logit"] = "loss"
    """Average draws outside the sigmoid (published), or inside, which nears the ELBO as draws grow."""
    times: Literal["uniform", "antithetic", "stratified", "path"] = "uniform"
    """Times of the draws of a pair: independent, pairs of t and 1 - t, or evenly spaced from a random start; or, on
    tokens, all T states of one way of unmasking, where each token is scored as it is revealed (no draws to set)."""
    sft: float = 0.0
    """Weight of the winners' own denoising error, a guard against both likelihoods falling."""
    clip_logit: float | None = None
    """Bound on logits, beyond which a pair has no gradient."""
    n: int = 2
    """Samples drawn for each slot: a round has `samples` slots."""
    label: Literal["bradley-terry", "soft", "hard", "best-worst"] = "bradley-terry"
    """Any two samples of a slot: first wins with chance sigmoid(gap / scale), both orders count by their chance (the
    same on average, with less noise), or the larger reward wins; or the slot's best against its worst."""
    scale: float = 1.0
    """Temperature of the labels: on tokens the target is p exp(r / (scale beta))."""
    on: Literal["policy", "ref"] = "ref"
    """Draw from the pretrained model, or from the current one (online)."""
    pairs: str = ""
    """File of pairs instead: parquet or csv with columns winner, loser and, where the model takes one, prompt."""
    sha256: str = ""
    """Content of that file, filled in by the plan."""

    def __post_init__(self) -> None:
        if self.n < 2 or self.draws < 1:
            raise ValueError(f"n must be 2 or more and draws 1 or more, not {self.n} and {self.draws}")
        if not self.scale > 0 or self.sft < 0 or (self.clip_logit is not None and not self.clip_logit > 0):
            raise ValueError("scale and clip_logit must be above 0, sft not below")

    @classmethod
    def complete(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the content of the file of pairs, which must be readable."""
        if not values["pairs"]:
            return dict(values)
        return {**values, "sha256": read_pairs(values["pairs"])[-1]}


def read_pairs(path: str) -> tuple[list[str], list[str], list[int] | None, str]:
    """Winners, losers, prompts (None without, or where all are one) and content hash of a file of pairs.

    Raises:
        DavBenchError: it cannot be read, lacks a column, or holds what is no pair of sequences.
    """
    import hashlib

    import polars as pl

    kind = Path(path).suffix.lower()
    readers: dict[str, Any] = {".csv": pl.read_csv, ".parquet": pl.read_parquet}
    fix = "columns winner and loser of A, C, G, T, all of one length, in a .csv or .parquet file"
    if kind not in readers:
        raise DavBenchError(f"{path} is no file of pairs.", f"Its name ends in {kind!r}.", fix)
    try:
        table = readers[kind](path)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except FileNotFoundError as err:
        raise DavBenchError(
            f"the pairs in {path} cannot be read.", str(err), fix, code=ExitCode.MISSING
        ) from err
    except (OSError, pl.exceptions.PolarsError) as err:
        raise DavBenchError(f"the pairs in {path} cannot be read.", str(err).split("\n")[0], fix) from err
    missing = [
        f"no column {name!r}{near(name, table.columns)}" for name in _COLUMNS if name not in table.columns
    ]
    if missing or not table.height:
        raise DavBenchError(f"{path} holds no pairs.", "\n".join(missing) or "It has no rows.", fix)
    winner, loser = (table[name].cast(pl.String).to_list() for name in _COLUMNS)
    length = len(winner[0] or "")
    for row, pair in enumerate(zip(winner, loser, strict=True), 1):
        for name, text in zip(_COLUMNS, pair, strict=True):
            if not text or len(text) != length or set(text) - set(LETTERS):
                raise DavBenchError(
                    f"{path} holds what is no pair of sequences.", f"Row {row}, {name}: {text!r}.", fix
                )
    return winner, loser, _prompts(path, table), digest


def _prompts(path: str, table: Any) -> list[int] | None:
    """One prompt for all pairs says nothing; several are the model's conditions, by number."""
    if "prompt" not in table.columns or table["prompt"].n_unique() < 2:
        return None
    if not table["prompt"].dtype.is_integer() or table["prompt"].null_count():
        raise DavBenchError(
            f"{path}: the prompts are no numbers of conditions.",
            f"The column prompt is {table['prompt'].dtype}; models here are conditioned by whole numbers.",
            "number the conditions, or leave the column out for a model that takes none",
        )
    return list(table["prompt"])


def pair_file(path: str, sha256: str = "") -> Searcher:
    """The pairs of a file as a searcher; refused where the file changed since the run was planned."""
    import torch

    from dav_bench.core import KnownPairs

    winner, loser, prompts, digest = read_pairs(path)
    if sha256 and digest != sha256:
        raise DavBenchError(
            f"the pairs in {path} changed since this run was planned.",
            f"Their content hash is {digest}, the run's is {sha256}.",
            "plan a new run with `dav-bench run`, or put the old file back",
        )
    kept = [k for k, pair in enumerate(zip(winner, loser, strict=True)) if pair[0] != pair[1]]
    if not kept:
        raise DavBenchError(f"{path} holds no pairs.", "Winner and loser are equal in every row.")

    def ids(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[LETTERS.index(letter) for letter in texts[k]] for k in kept])

    cond = None if prompts is None else torch.tensor(prompts)[kept]
    return KnownPairs(ids(winner), ids(loser), cond, ties=len(winner) - len(kept))


def build(c: DPO) -> Method:
    from dav_bench.core import Pairs, Preference

    search = pair_file(c.pairs, c.sha256) if c.pairs else Pairs(c.n, c.label, c.scale, c.on)
    loss = Preference(c.beta, c.reduce, c.draws, c.average, c.times, c.sft, c.clip_logit)
    return Method(search, loss, Training.of(c))
