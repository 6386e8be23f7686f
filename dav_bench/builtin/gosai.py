"""The published files of the task `dna-gosai`: their settings, where each is looked for and how it is read.

They cannot be shipped; `tasks/dna-gosai/README.md` says who offers them.  This module imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dav_bench.errors import DavBenchError, ExitCode

FOLDER = "DAV_BENCH_GOSAI"
"""Environment variable: the folder with all files, under the names below."""

CELLS = ("hepg2", "k562", "sknsh")
"""Output columns of the oracles and activity columns of the dataset."""

_DRAKES = "DRAKES_data.zip, whose link is in the README of the DRAKES repository (ChenyuWang-Monica/DRAKES)"


@dataclass(frozen=True)
class Artefact:
    """One published file."""

    file: str
    """Its name in the folder."""
    what: str
    """What it is."""
    where: str
    """Who offers it."""
    option: str = ""
    """The setting that gives its path, where there is one."""

    @property
    def fix(self) -> str:
        """How to provide it."""
        option = f"--set {self.option}=PATH, or " if self.option else ""
        return f"get it from {self.where}, then {option}{FOLDER}=FOLDER with {self.file} in it"

    def locate(self, path: str = "") -> Path:
        """The file at `path`, or in the folder; a missing one is named with where to get it."""
        folder = os.environ.get(FOLDER, "")
        if not path and not folder:
            raise DavBenchError(
                f"The {self.what} is needed.", "it is not shipped", self.fix, code=ExitCode.MISSING
            )
        found = Path(path).expanduser() if path else Path(folder).expanduser() / self.file
        if not found.is_file():
            raise DavBenchError(
                f"The {self.what} is missing.", f"there is no file {found}", self.fix, code=ExitCode.MISSING
            )
        return found


DENOISER = Artefact(
    "last.ckpt",
    "masked diffusion model (MDLM) of the Gosai set",
    "the W&B artifact fderc_diffusion/bioseq-optimization/DNA_Diffusion:v0",
    "model.path",
)
ORACLE = Artefact("reward_oracle_ft.ckpt", "activity oracle for training", _DRAKES, "reward.train.path")
HELDOUT = Artefact(
    "reward_oracle_eval.ckpt", "activity oracle for evaluation", _DRAKES, "reward.heldout.path"
)
ATAC = Artefact("binary_atac_cell_lines.ckpt", "classifier of open chromatin", _DRAKES)
DATASET = Artefact("dataset.csv.gz", "dataset of measured elements", _DRAKES)


@dataclass(frozen=True)
class GosaiModel:
    """Settings of the model `gosai`."""

    path: str = ""
    """The MDLM checkpoint; empty looks in $DAV_BENCH_GOSAI."""
    weights: Literal["raw", "ema"] = "raw"
    """The last iterate, as the release loads it, or the exponential average that lies beside it."""
    time_input: bool = False
    """Feed the noise level to the network; it was trained and is sampled with 0."""


@dataclass(frozen=True)
class GosaiReward:
    """Settings of the rewards `gosai-hepg2` and `gosai-hepg2-heldout`."""

    path: str = ""
    """The oracle's checkpoint; empty looks in $DAV_BENCH_GOSAI."""
    cell: Literal["hepg2", "k562", "sknsh"] = "hepg2"
    """Cell line whose activity is the reward."""
