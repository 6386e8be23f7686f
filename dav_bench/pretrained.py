"""Weights that others published: found by path or hub id, read safely, and named with their source where missing.

One place, so that every component asks for what it lacks in the same words.  Nothing heavy is imported before use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, ExitCode

if TYPE_CHECKING:
    from torch import Tensor

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Published:
    """One artefact that is not shipped."""

    what: str
    """What it is, after "the"."""
    source: str
    """Hub id, or where else it is offered."""
    licence: str
    """Of the weights, as their authors state it."""
    setting: str
    """Field of the component's settings that points to it."""
    files: str = "the folder"
    """What the setting names locally: the folder, or the file."""

    @property
    def fix(self) -> str:
        """How to provide it."""
        hub = " on huggingface.co" if _HUB_ID.fullmatch(self.source) else ""
        place = self.files.removeprefix("the ").upper()
        return (
            f"get it from {self.source}{hub} (licence: {self.licence}), then --set reward.train.{self.setting}={place} "
            f"(reward.heldout.{self.setting} for the held-out reward)"
        )

    def missing(self, why: str) -> DavBenchError:
        """The error to raise where it cannot be had."""
        return DavBenchError(f"The {self.what} is missing.", why, self.fix, code=ExitCode.MISSING)

    def file(self, name: str, file: str) -> Path:
        """The file that `name` is, or `file` in the folder or the hub's repository of that name.

        Raises:
            DavBenchError: there is none, with the source and the setting that points to it.
        """
        path = Path(name).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            if (path / file).is_file():
                return path / file
            raise self.missing(f"the folder {path} holds no {file}")
        if not _HUB_ID.fullmatch(name):
            raise self.missing(f"there is no file or folder {name!r}")
        from huggingface_hub import hf_hub_download

        with self.reading(name):
            return Path(hf_hub_download(name, file))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Whatever fails while `name`, a folder or a hub id, is read inside is one error with the source."""
        try:
            yield
        except DavBenchError:
            raise
        except Exception as err:  # of the hub, the network, the file system or a parser
            first = next((line.strip() for line in str(err).splitlines() if line.strip()), "")
            raise self.missing(f"{name!r} cannot be read ({type(err).__name__}): {first:.200}") from err

    def tensors(self, name: str, file: str) -> dict[str, Tensor]:
        """Tensors by name of a safetensors file, or of a torch checkpoint, whose pickle is read without running it."""
        path = self.file(name, file)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with self.reading(str(path)):
                return load_file(path)
        from dav_bench.builtin.checkpoints import load_checkpoint, state_dict

        return state_dict(load_checkpoint(path, self.what, self.fix), what=self.what)

    def fill(self, network: Any, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors into a network in its dtype; a key or a shape that differs is an error with the source."""
        from dav_bench.builtin.checkpoints import fill

        fill(network, tensors, self.what, self.fix)

    def model(self, cls: Any, name: str, **options: Any) -> Any:
        """`cls.from_pretrained(name)` of transformers in evaluation mode, every weight of which was in the file."""
        with _quiet(), self.reading(name):
            module, info = cls.from_pretrained(name, output_loading_info=True, **options)
        lacking = sorted(info["missing_keys"])
        if lacking:
            raise DavBenchError(
                f"{name!r} is not the {self.what} it should be",
                f"missing keys: {', '.join(lacking[:3])}"
                + (f" and {len(lacking) - 3} more" if lacking[3:] else ""),
                self.fix,
            )
        return module.eval().requires_grad_(False)

    def tokenizer(self, cls: Any, name: str) -> Any:
        """`cls.from_pretrained(name)` of transformers, which makes one without words where the files are missing."""
        with self.reading(name):
            found = cls.from_pretrained(name)
        if not set(found.get_vocab()) - set(found.all_special_tokens):
            raise self.missing(f"{name!r} holds no vocabulary, or cannot be had from the hub")
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers, which tell of the parts of a file that are not used."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
