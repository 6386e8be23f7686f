"""Runs on a tiny pipeline: interrupted and resumed they end as in one go, and what they save is what they trained."""

from pathlib import Path

import pytest
import torch
from pipelines import folder, quiet
from test_runner import assert_same

from dav_bench.cli.run import planned
from dav_bench.runner import Options, execute
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

TASK = """\
schema = 1
name = "tiny-latent"
version = 1
[model]
use = "diffusers"
path = '{path}'
process = "ddim"
[reward]
train = "colourfulness"
exact = true
[metrics]
quality = ["reward"]
diversity = []
natural = []
[prompts]
train = ["cat", "bee"]
repeat = 2
[sampler]
steps = 3
eta = 1.0
guidance = 2.0
[eval]
samples = 4
every = 0
"""


class Stop:
    """Ctrl-C after the first round."""

    def round_finished(self, event: object) -> None:
        if event.round == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks" / "tiny-latent").mkdir(parents=True)
    (tmp_path / "tasks" / "tiny-latent" / "task.toml").write_text(TASK.format(path=folder("sd")))
    return tmp_path


def spec(method: str, *sets: str) -> RunSpec:
    small = [f"{method}.{k}" for k in ("rounds=2", "samples=4", "minibatch=6", "updates=1", "lr=0.02")]
    runs = planned(
        methods=[method], tasks=["tiny-latent"], sets=[*small, *sets], baselines=False, search=None
    )
    assert runs[0].status == "new", runs[0].reason
    return runs[0].spec


@pytest.mark.parametrize(
    "method", ["dav-kl", "vidd"]
)  # with a reference, and with a lagged copy of the network
def test_a_resumed_run_with_adapters_ends_like_a_whole_one(method: str, tiny: Path) -> None:
    whole = execute(spec(method), Options(out=tiny / "a", threads=1, device="cpu"))
    assert whole.status == "done", whole.meta.get("error")
    with pytest.raises(KeyboardInterrupt):
        execute(spec(method), Options(out=tiny / "b", threads=1, device="cpu", listeners=(Stop(),)))
    parts = execute(spec(method), Options(out=tiny / "b", threads=1, device="cpu"))
    assert_same(whole, parts)
    weights = whole.load_weights()
    assert all(".lora_" in name or "/" in name for name in weights)
    held = sum(v.numel() for v in weights.values())
    assert held < 20_000, "checkpoints hold adapters, not the denoiser"


def test_a_finished_run_holds_adapters_that_diffusers_loads(tiny: Path) -> None:
    from diffusers import DiffusionPipeline

    done = execute(spec("dav"), Options(out=tiny / "out", threads=1, device="cpu"))
    assert done.status == "done", done.meta.get("error")
    saved = next((done.path / "artifacts").rglob("pytorch_lora_weights.safetensors")).parent
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder("sd"))
        pipe.load_lora_weights(saved)
    loaded = {n: p for n, p in pipe.unet.named_parameters() if ".lora_" in n}
    trained = _trained(done)
    assert len(loaded) == len(trained)
    assert all(torch.allclose(p, trained[_generic(n)]) for n, p in loaded.items())
    assert any(p.abs().max() > 1e-4 for n, p in loaded.items() if "lora_B" in n), "they were trained"


def _trained(run: RunDir) -> dict[str, torch.Tensor]:
    return {_generic(name.removeprefix("backbone.")): value for name, value in run.load_weights().items()}


def _generic(name: str) -> str:
    """Without the name of the adapter, which each tool chooses itself."""
    return ".".join(part for part in name.split(".") if part not in ("default", "default_0"))
