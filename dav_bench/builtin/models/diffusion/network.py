"""The denoiser of a pipeline as a network of states, times and prompt numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dav_bench.builtin.diffusion import Tuning
from dav_bench.builtin.models.diffusion.pipelines import Family, Rows, quiet
from dav_bench.core.model import chunks
from dav_bench.errors import DavBenchError


class Prompts:
    """What a denoiser is told of each prompt: a table made once by the text encoders, shared by all its copies.

    Args:
        pipe: the pipeline, whose text encoders and tokenizers are used.
        family: how it encodes.
        size: side of the images in pixels.
        batch: most texts encoded at once.
    """

    def __init__(self, pipe: Any, family: Family, size: int, batch: int = 32) -> None:
        self.pipe, self.family, self.size, self.batch = pipe, family, size, batch
        self.table: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device) -> None:
        """Each text once, and the empty one, which comes last; replaces what was encoded before."""
        for number, text in enumerate(texts):
            if not text.strip():
                raise DavBenchError(f"prompt {number + 1} of {len(texts)} is empty.", fix="leave it out")
        if self.pipe is None:
            raise RuntimeError("the text encoders were dropped after the prompts had been encoded")
        parts = self.pipe.components.items()
        encoders = [p for name, p in parts if name.startswith("text_encoder") and p is not None]
        for encoder in encoders:
            encoder.to(device)
        _say_what_is_cut(self.pipe, texts)
        every, made = [*texts, ""], []
        with quiet():
            for c in chunks(len(every), self.batch):
                made.append(self.family.encode(self.pipe, every[c], device, self.size))
        self.table = {name: torch.cat([rows[name] for rows in made]) for name in made[0]}
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            for name in self.family.zeroed:
                self.table[name][-1] = 0
        for encoder in encoders:
            encoder.to("cpu")

    def drop(self) -> None:
        """Lets go of the text encoders."""
        self.pipe = None

    def rows(self, cond: Tensor | None, x: Tensor, guided: bool) -> Rows:
        """Rows of the prompts numbered `cond` (B,), all empty if None, for states x; B empty ones first if `guided`."""
        if not self.table:
            self.encode((), x.device)
        last = next(iter(self.table.values())).shape[0] - 1
        empty = torch.full((len(x),), last, device=x.device)
        index = empty if cond is None else cond.to(x.device)
        index = torch.cat([empty, index]) if guided else index
        return {name: row.to(x)[index] for name, row in self.table.items()}


def _say_what_is_cut(pipe: Any, texts: Sequence[str]) -> None:
    """Warns once of each prompt that is longer than a text encoder reads."""
    from dav_bench.images import say_cut

    told = set()
    for name, part in pipe.components.items():
        if not name.startswith("tokenizer") or part is None:
            continue
        length = int(part.model_max_length)
        if name == "tokenizer_3":  # of Stable Diffusion 3, whose T5 is given less than it could read
            length = min(length, 256)
        tokens = part(list(texts), verbose=False)["input_ids"] if texts else []
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > length and text not in told:
                told.add(text)
                say_cut("the text encoder", length, part.decode(ids[: length - 1], skip_special_tokens=True))


class Denoiser(nn.Module):
    """network(x, t, cond): latents (B, C, h, w), times (B,) in [0, 1] and prompt numbers (B,) -> predictions.

    With classifier-free guidance a call computes a row without and a row with the prompt for each state, together
    (Ho and Salimans 2022).  What is trained are adapters, or all weights; only those are copied by `deepcopy` and
    held in `state_dict`, as everything else is the pipeline's.

    Args:
        backbone: the pipeline's denoiser, frozen.
        family: how it is called.
        prompts: what it is told of prompts.
        guidance: scale; at most 1 leaves it out.
        span: number of timesteps it was trained with; times are shares of it.
        discrete: timesteps are whole numbers.
        c: what is trained.
        embedding: (1, E) of the guidance scale, for models distilled with it; they need no second row.
    """

    time_input = True

    def __init__(
        self, backbone: nn.Module, family: Family, prompts: Prompts, guidance: float, span: int, discrete: bool,
        c: Tuning, embedding: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.family, self.prompts = backbone, family, prompts
        self.guidance, self.span, self.discrete = guidance, span, discrete
        self.embedding: Tensor | None
        self.register_buffer("embedding", embedding, persistent=False)
        self.adapted = True
        self.lora = c.adapter == "lora"
        self.scale = 1.0
        if self.lora:
            self._adapt(c)
        else:
            backbone.requires_grad_(True)
        self.trained = tuple(name for name, p in self.named_parameters() if p.requires_grad)
        if c.gradient_checkpointing:
            backbone.enable_gradient_checkpointing(self._checkpoint)  # type: ignore[operator]

    @property
    def rows(self) -> int:
        """Rows computed for each state."""
        return 2 if self.guidance > 1 and self.embedding is None else 1

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        guided = self.rows == 2
        rows = self.prompts.rows(cond, x, guided)
        t = (t * self.span).round() if self.discrete else t * self.span
        if not guided:
            w = None if self.embedding is None else self.embedding.to(x).expand(len(x), -1)
            return self.family.call(self.backbone, x, t, rows, w)
        both = self.family.call(self.backbone, torch.cat([x, x]), torch.cat([t, t]), rows, None).to(x.dtype)
        without, given = both.chunk(2)
        return without + self.guidance * (given - without)

    # ---- adapters
    def _adapt(self, c: Tuning) -> None:
        from peft import LoraConfig

        alpha = c.rank if c.alpha is None else c.alpha
        self.scale = alpha / c.rank
        # down ~ N(0, 1 / rank²) and up = 0, as in the LoRA of diffusers that DDPO and DAV use
        layers = list(self.family.layers)
        config = LoraConfig(r=c.rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone.add_adapter(config)  # type: ignore[operator]

    @contextmanager
    def adapters(self, on: bool) -> Iterator[None]:
        """With or without the adapters while inside."""
        before = self.adapted
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        if on == self.adapted:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.backbone.modules():
            if isinstance(layer, BaseTunerLayer):
                # `enable_adapters` would also unfreeze copies that are frozen
                layer._disable_adapters = not on
        self.adapted = on

    def _checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Computes a block again in the backward pass as it was computed: with or without adapters."""
        on = self.adapted

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.adapters(on)

        return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)

    def reference(self) -> nn.Module | None:
        """The pretrained network as a view of this one, where that is possible."""
        return Unadapted(self) if self.lora else None

    def lora_state(self) -> dict[str, Tensor]:
        """Adapters by the names that diffusers gives them, on the CPU, with their scale in the weights."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.backbone, adapter_name="default")
        return {
            name: (value * self.scale if "lora_B" in name else value).detach().cpu().contiguous()
            for name, value in state.items()
        }

    # ---- copies and states hold what is trained
    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        frozen = [p for p in (*self.parameters(), *self.buffers()) if not p.requires_grad]
        memo.update({id(p): p for p in frozen})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        full = super().state_dict(*args, **options)
        if args or options:  # as a part of another module: all
            return full
        return {name: full[name] for name in self.trained}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        own = dict(self.named_parameters())
        if set(state) != set(self.trained):
            raise KeyError(f"expected {len(self.trained)} tensors of what is trained, got {len(state)}")
        with torch.no_grad():
            for name in self.trained:
                own[name].copy_(state[name])


class Unadapted(nn.Module):
    """A denoiser without its adapters: the pretrained model, which shares every weight and trains none."""

    time_input = True

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network = network

    @property
    def rows(self) -> int:
        return self.network.rows

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        with self.network.adapters(False):
            return self.network(x, t, cond)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Its own weights; the adapters are none of them."""
        trained = {f"network.{name}" for name in self.network.trained}
        return ((name, p) for name, p in super().named_parameters(*args, **options) if name not in trained)
