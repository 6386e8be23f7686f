"""Text-to-image runs as a whole, on a tiny random pipeline: every method that fits, pictures, metrics and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import polars as pl
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dav_bench.cli.plot import app
from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError
from dav_bench.plan import PlannedRun
from dav_bench.plugins import catalog
from dav_bench.report.pictures import load_grid
from dav_bench.runner import Options, execute, final_metrics
from dav_bench.store import RunDir
from dav_bench.tasks import find_task, read_task

TASK = """\
schema = 1
name = "tiny"
version = 1
[model]
use = "diffusers"
path = '{pipeline}'
process = "ddim"
[reward]
train = "{reward}"
exact = true
[features]
clip = '{clip}'
[metrics]
quality = ["reward", "clipscore"]
diversity = ["clip-distance", "vendi", "lpips"]
natural = []
[prompts]
train = "animals.txt"
eval = ["cat", "dog"]
repeat = 2
[sampler]
steps = 3
eta = 1.0
guidance = 2.0
[eval]
samples = 8
every = 0
"""
SMALL = {"rounds": 1, "samples": 4, "minibatch": 6, "updates": 1, "lr": 0.02, "width": 2, "n": 2, "group": 2}


def clip_folder(folder: Path) -> Path:
    """A tiny CLIP model of transformers with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    tokens, vocab = pipelines.tokenizer(folder / "tokens")
    small = dict(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, projection_dim=8
    )
    text = dict(small, vocab_size=vocab, max_position_embeddings=pipelines.CONTEXT, eos_token_id=vocab - 1)
    torch.manual_seed(0)
    with pipelines.quiet():
        vision = dict(small, image_size=16, patch_size=4)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        model.save_pretrained(folder / "clip")
        tokens.save_pretrained(folder / "clip")
    return folder / "clip"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


def _settings(method: str) -> set[str]:
    config: Any = catalog().get("methods", method).config
    return {f.name for f in fields(config)}


Made = Callable[..., dict[str, PlannedRun]]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path) -> Made:
    """Plans runs on the tiny task, by label."""
    monkeypatch.chdir(tmp_path)

    def make(
        *methods: str,
        reward: str = "colourfulness",
        sets: tuple[str, ...] = (),
        animals: str = "cat\nbee\nbig dog\n",
        **options: Any,
    ) -> Any:
        folder = tmp_path / "tasks" / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        text = TASK.format(pipeline=pipelines.folder("sd"), clip=clip, reward=reward)
        (folder / "task.toml").write_text(text)
        (folder / "animals.txt").write_text(animals)
        options = {"baselines": False, "search": None, **options}
        small = [f"{m}.{k}={v}" for m in methods for k, v in SMALL.items() if k in _settings(m)]
        runs = planned(methods=list(methods), tasks=["tiny"], sets=[*small, *sets], **options)
        return {run.spec.label: run for run in runs}

    return make


def run(planned_run: PlannedRun) -> RunDir:
    assert planned_run.status == "new", planned_run.reason
    done = execute(planned_run.spec, Options(threads=1, device="cpu"))
    assert done.status == "done", done.meta["error"]
    return done


def test_a_run_keeps_its_pictures_and_the_grid_can_be_made_again(tiny: Made, tmp_path: Path) -> None:
    made = tiny("dav", baselines=True)
    before, after = run(made["pretrained"]), run(made["dav"])
    table = after.samples()
    assert table["prompt"].to_list() == ["cat", "dog"] * 4
    pictures = [np.asarray(Image.open(after.path / name)) for name in table["file"]]
    assert all(p.shape == (pipelines.SIDE, pipelines.SIDE, 3) for p in pictures)
    with Image.open(after.path / table["file"][3]) as image:
        assert image.info["prompt"] == "dog"
    # the left half is what the pretrained model draws from the same noise, and training moved the right half
    grid = sorted((after.path / "artifacts" / "grid").glob("*-before.png"))
    assert len(grid) == 8 + 4
    prompts = load_grid(after.path / "artifacts")[2]
    assert prompts == ["cat", "dog"] * 4 + ["bee", "bee", "big dog", "big dog"]  # nothing measures the last
    untrained = [np.asarray(Image.open(before.path / name)) for name in before.samples()["file"]]
    assert all(np.array_equal(np.asarray(Image.open(p)), q) for p, q in zip(grid[:8], untrained, strict=True))
    assert not np.array_equal(pictures[0], untrained[0])
    assert not list((before.path / "artifacts" / "grid").glob("*-before.png"))  # nothing was aligned there
    out = tmp_path / "again.png"
    said = CliRunner().invoke(app, ["samples", str(after.path), "--out", str(out)], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    kept = after.path / "artifacts" / "grid.png"
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(kept)))


def test_metrics_are_kept_for_each_prompt_and_over_all(tiny: Made) -> None:
    done = run(tiny("pretrained")["pretrained"])
    found = final_metrics(done)
    assert {
        "clip-distance",
        "clip-distance/cat",
        "clip-distance/dog",
        "clip-distance/all",
        "vendi/cat",
    } <= set(found)
    assert "lpips" not in found  # its backbone was not given
    mean = (found["clip-distance/cat"] + found["clip-distance/dog"]) / 2
    assert found["clip-distance"] == pytest.approx(mean)
    rows = done.metrics().filter(pl.col("metric") == "vendi/cat")
    assert rows["n"].to_list() == [4]
    assert 1 <= found["vendi"] <= 4
    scores = done.samples()["metric.clipscore"].to_numpy()
    assert found["clipscore"] == pytest.approx(scores.mean(), abs=1e-6) and abs(scores).max() <= 1


def test_the_clip_model_of_the_metrics_is_that_of_transformers(clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    from dav_bench.builtin.metrics.image import _clip_of

    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    eye, model = _clip_of(str(clip)), CLIPModel.from_pretrained(clip).eval()
    eye.encode(["cat", "big dog"])
    words = AutoTokenizer.from_pretrained(clip)(["cat", "big dog"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(**words, pixel_values=(x - eye.pixels.mean) / eye.pixels.std)
        cosines = out.logits_per_image / model.logit_scale.exp()
        mine = eye.head(eye.features(x), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(mine, cosines[range(3), [0, 1, 0]], atol=1e-5, rtol=1e-4)


# ---- every method


METHODS = [e.name for e in catalog().all("methods") if not {"data", "target"} & set(e.requires)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reward", ["colourfulness", "jpeg-compressibility"])
def test_every_method_that_fits_runs(name: str, reward: str, tiny: Made) -> None:
    made = tiny(name, reward=reward)[name]
    if reward != "colourfulness" and made.status == "skip":
        assert "reward.grad" in made.reason  # a black box has none, and the reason says so
        return
    done = run(made)
    found = final_metrics(done)
    assert np.isfinite(found["reward"]) and np.isfinite(found["clip-distance"])
    assert done.samples().height == 8


def test_a_search_without_gradient_runs_on_files(tiny: Made) -> None:
    made = tiny("dav", reward="jpeg-compressibility", sets=("dav.guide=false",), search="tree")
    done = [run(r) for r in made.values()]
    assert [r.meta["label"] for r in done] == ["dav", "dav+tree"]


# ---- bad input


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (("prompts.eval=none.txt",), r"there is no file 'none.txt'"),
        (("model.path=nowhere/at/all",), r"nowhere"),
        (("model.size=7",), r"7 x 7 pixels cannot be encoded"),
        (("reward.train.use=hepg2-specificity",), r"hepg2-specificity.*(sequence|image)"),
        (("sampler.eta=2",), r"eta"),
    ],
)
def test_bad_input_is_one_clear_error(sets: tuple[str, ...], text: str, tiny: Made) -> None:
    with pytest.raises(DavBenchError) as caught:
        made = tiny("pretrained", sets=sets)["pretrained"]
        if made.status == "skip":
            raise DavBenchError(made.reason)
        done = execute(made.spec, Options(threads=1, device="cpu"))
        raise DavBenchError(str(done.meta["error"]))
    assert re.search(text, str(caught.value)), str(caught.value)


def test_a_file_without_prompts_is_refused(tiny: Made) -> None:
    with pytest.raises(DavBenchError, match=r"animals.txt holds no prompt"):
        tiny("pretrained", animals="\n# nothing\n")


def test_a_prompt_that_is_too_long_is_cut_with_a_word(tiny: Made) -> None:
    made = tiny("pretrained", sets=("prompts.eval=cat,a very long prompt about cats and dogs",))["pretrained"]
    with pytest.warns(UserWarning, match="the prompt is cut after"):
        run(made)


def test_a_task_says_what_its_metrics_look_through(tmp_path: Path) -> None:
    text = TASK.format(pipeline="p", reward="colourfulness", clip="c")
    (tmp_path / "task.toml").write_text(text)
    task = read_task(tmp_path)
    assert task.features == {"clip": "c"}
    (tmp_path / "task.toml").write_text(text.replace("clip = 'c'", "clip = 'd'"))
    assert read_task(tmp_path).hash != task.hash  # another measurement
    (tmp_path / "task.toml").write_text(text.replace("clip = 'c'", "clop = 'c'\nclip = 3"))
    with pytest.raises(
        DavBenchError, match=r"features.clop: unknown key; did you mean 'clip'[^:]*\n.*features.clip: exp"
    ):
        read_task(tmp_path)


# ---- the tasks that ship


def test_prompt_files_of_the_tasks() -> None:
    t2i = find_task("t2i")
    animals = (t2i.folder / "animals.txt").read_text().split()
    assert len(animals) == len(set(animals)) == 39 and "squirrel" not in animals
    heldout = (t2i.folder / "heldout.txt").read_text().split()
    assert not set(heldout) & set(animals)
    lists = [(find_task(f"sd15-{n}").folder / "animals.txt").read_text().split()
             for n in ("aesthetic", "compress", "incompress", "imagereward")]  # fmt: skip
    assert all(x == lists[0] for x in lists) and len(set(lists[0])) == 45
    assert set(animals) < set(lists[0])


@pytest.mark.parametrize("task", ["t2i", "t2i-compress", "t2i-incompress", "sd15-aesthetic", "sd15-imagereward",
                                  "sd15-compress", "sd15-incompress"])  # fmt: skip
def test_the_default_method_fits_every_task(task: str) -> None:
    for made in planned(methods=["dav"], tasks=[task]):
        assert made.status != "skip", f"{made.spec.label}: {made.reason}"
        assert len(made.spec.prompts["train"]) >= 39


def test_the_published_settings_are_those_of_the_paper() -> None:
    """dav.md B.1; the JPEG scripts differ in width, guidance and rounds."""
    for task, width, guide, rounds in (("sd15-aesthetic", 4, True, 100), ("sd15-compress", 16, False, 10)):
        for made in planned(methods=["dav", "dav-kl"], tasks=[task], search=None, baselines=False):
            c = made.spec.params
            assert (c["width"], c["guide"], c["rounds"]) == (width, guide, rounds)
            assert (c["alpha"], c["gamma"], c["lr"], c["weight_decay"], c["clip"]) == (
                0.005,
                0.9,
                1e-3,
                1e-4,
                1.0,
            )
            assert c["kl"] == (0.01 if made.spec.label == "dav-kl" else 0.0)
            assert made.spec.sampler == {"steps": 50, "eta": 1.0, "guidance": 5.0}
            assert made.spec.model["rank"] == 4
