"""Prompts: what a text-to-image model is asked for, while training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptSettings:
    """The section `prompts` of a task file; `--set prompts.eval=tiger,owl` or `--set prompts.train=mine.txt`."""

    train: tuple[str, ...] = ()
    """Prompts of training, or one file (.txt) with a prompt on each line, in the task's folder or the current one."""
    eval: tuple[str, ...] = ()
    """Prompts that are evaluated, likewise; none are those of training."""
    repeat: int = 8
    """Samples of a training round that share a prompt: groups of GRPO, pairs of DPO, particles of FAV."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one run, numbered in the order of `texts`: what conditions (B,) count in."""

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    repeat: int = 8

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Prompts:
        """From `RunSpec.prompts`, which is empty where the model reads no text."""
        return cls(
            tuple(values.get("train", ())), tuple(values.get("eval", ())), int(values.get("repeat", 8))
        )

    @cached_property
    def texts(self) -> list[str]:
        """Every prompt once: those of training first."""
        return list(dict.fromkeys([*self.train, *self.eval]))

    def __bool__(self) -> bool:
        return bool(self.train or self.eval)

    def training(self, n: int, seed: int) -> torch.Tensor | None:
        """(n,) numbers for the samples of a round: prompts in random order, each for `repeat` samples in a row."""
        if not self:
            return None
        import torch

        from dav_bench.core import Noise

        rounds = -(-n // (self.repeat * len(self.train)))
        # each prompt comes once before any comes again
        order = [Noise.of(seed, len(self.train), k * len(self.train)).uniform(1)[:, 0].argsort() for k in range(rounds)]
        numbers = torch.tensor([self.texts.index(text) for text in self.train])
        return numbers[torch.cat(order)].repeat_interleave(self.repeat)[:n]

    def evaluation(self, n: int, start: int = 0) -> torch.Tensor | None:
        """(n,) numbers for the evaluated samples `start`, `start + 1`, ...: the prompts in turn."""
        if not self:
            return None
        import torch

        numbers = torch.tensor([self.texts.index(text) for text in self.eval])
        return numbers[(torch.arange(n) + start) % len(numbers)]

    def others(self, each: int) -> torch.Tensor:
        """Numbers of the training prompts that evaluation leaves out, each `each` times; (0,) where there are none."""
        import torch

        numbers = [self.texts.index(text) for text in self.train if text not in self.eval]
        return torch.tensor(numbers, dtype=torch.long).repeat_interleave(each)


def read(items: Sequence[str], folders: Sequence[Path], what: str) -> list[str]:
    """Prompts as given, or the lines of the one file that is named.

    Raises:
        DavBenchError: the file is missing or empty, or a prompt is.
    """
    if len(items) == 1 and items[0].endswith(".txt"):
        path = next((f / items[0] for f in folders if (f / items[0]).is_file()), None)
        if path is None:
            places = ", ".join(str(f / items[0]) for f in folders)
            why = f"Looked for {places}."
            raise DavBenchError(f"{what}: there is no file {items[0]!r}.", why, "a text file, one prompt a line")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise DavBenchError(f"{what}: {path} cannot be read.", str(err)) from err
        items = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not items:
            raise DavBenchError(f"{what}: {path} holds no prompt.", fix="one prompt on each line")
    if any(not text.strip() for text in items):
        raise DavBenchError(f"{what}: a prompt is empty.", fix="leave it out")
    return [text.strip() for text in items]


def resolved(values: Mapping[str, Any], sources: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """`RunSpec.prompts` of settings: the texts themselves, so that a run does not depend on a file; empty without any.

    Args:
        values: Fields of `PromptSettings`.
        sources: Where each comes from; what the task file names lies in its folder, else in the current one first.
        folder: The task's folder.

    Raises:
        DavBenchError: a file or a prompt cannot be used.
    """
    texts = {}
    for key in ("train", "eval"):
        own = sources.get(key, "") == "task file"
        folders = [folder] if own else [Path.cwd(), folder]
        texts[key] = read(values[key], folders, f"prompts.{key} ({sources.get(key, 'default')})")
    train, judged = texts["train"] or texts["eval"], texts["eval"] or texts["train"]
    if not train:
        return {}
    if values["repeat"] < 1:
        raise DavBenchError(f"prompts.repeat: at least 1 sample has a prompt, got {values['repeat']}")
    return {"train": train, "eval": judged, "repeat": values["repeat"]}
