"""A reward without a gradient: who is refused, how `--reward-wrap nes` lets them in, and what spaces particles need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dav_bench.build import wrap_reward
from dav_bench.errors import DavBenchError
from dav_bench.layers import set_layers
from dav_bench.plan import Request, plan
from dav_bench.plugins import catalog
from dav_bench.registry import Catalog, Entry
from dav_bench.tasks import find_task

BLIND = "def blind(sample, cond):\n    return -(sample.detach() ** 2).sum(1)\n"


@pytest.fixture
def known() -> Catalog:
    made = Catalog()
    for entry in catalog():
        made.add(entry)
    made.add(Entry("rewards", "box", "x:y", domain="vector"))
    made.add(Entry("rewards", "strings", "x:y", domain="sequence"))
    return made


def runs(known, tmp_path, methods, task="toy-mixture", sets=(), **options):
    (layer,) = set_layers(sets, known)
    request = Request(methods, [find_task(task)], layers=[layer], baselines=False, search=None, **options)
    return plan(request, known, tmp_path)


def test_a_gradient_method_is_shown_the_way_to_a_black_box(known, tmp_path):
    for method in ("fav", "draft"):
        (refused,) = runs(known, tmp_path, [method], reward="box")
        assert refused.status == "skip" and "needs reward.grad" in refused.reason
        assert refused.fix == "--reward-wrap nes"
        (allowed,) = runs(known, tmp_path, [method], reward="box", wrap="nes", sets=["nes.n=4"])
        assert allowed.status == "new"
        assert allowed.spec.rewards["train"] == {"use": "box", "wrap": {"name": "nes", "n": 4, "sigma": 0.01}}
        assert allowed.sources["nes.n"] == "--set" and allowed.sources["nes.sigma"] == "default"


def test_the_wrap_is_part_of_what_a_run_is_and_of_no_run_that_needs_none(known, tmp_path):
    plain = runs(known, tmp_path, ["fav", "dpo"])
    wrapped = runs(known, tmp_path, ["fav", "dpo"], wrap="nes")
    other = runs(known, tmp_path, ["fav", "dpo"], wrap="nes", sets=["nes.sigma=0.1"])
    assert len({run.spec.identity for run in (plain[0], wrapped[0], other[0])}) == 3
    assert plain[1].spec == wrapped[1].spec == other[1].spec
    with pytest.raises(DavBenchError, match="no method of this command follows"):
        runs(known, tmp_path, ["dpo"], wrap="nes")
    with pytest.raises(DavBenchError, match="did you mean 'nes'"):
        runs(known, tmp_path, ["fav"], wrap="ness")
    with pytest.raises(DavBenchError, match="nothing in this command has it"):
        runs(known, tmp_path, ["fav"], sets=["nes.n=4"])


def test_between_tokens_there_is_nothing_to_estimate_from(known, tmp_path):
    (refused,) = runs(known, tmp_path, ["draft"], "toy-tokens", reward="strings", wrap="nes")
    assert refused.status == "skip" and "between two tokens" in refused.reason
    assert refused.fix == "dav-bench list methods --fits toy-tokens"
    (blind,) = runs(known, tmp_path, ["draft"], "toy-tokens", reward="strings")
    assert "nes" not in blind.fix, "no way out that is none"


def test_particles_of_tokens_need_features(known, tmp_path):
    (refused,) = runs(known, tmp_path, ["fav"], "toy-tokens")
    assert "needs continuous" in refused.reason and refused.fix == "--set fav.features=reward"
    assert runs(known, tmp_path, ["fav"], "toy-tokens", sets=["fav.features=reward"])[0].status == "new"
    (lacking,) = runs(known, tmp_path, ["fav"], "tfbind8")
    assert lacking.fix == "--set fav.features=reward, with a reward that gives reward.features"
    (blind,) = runs(known, tmp_path, ["fav"], sets=["fav.features=reward"])
    assert "reward.features" in blind.reason and blind.fix == "--set fav.features=identity"


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("fav.particles=5", "groups of 5"),
        ("fav.taus=0", "above 0"),
        ("fav.references=0", "references"),
        ("dpo.n=1", "2 or more"),
        ("dpo.scale=0", "above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_the_plan(known, tmp_path, setting, what):
    with pytest.raises(DavBenchError, match=what):
        runs(known, tmp_path, [setting.split(".")[0]], sets=[setting])


def test_a_path_of_unmasking_and_a_file_of_pairs_are_for_tokens(known, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("winner,loser\nACG,ACT\n")
    for setting in ("dpo.times=path", f"dpo.pairs={file}"):
        assert runs(known, tmp_path, ["dpo"], "toy-tokens", sets=[setting])[0].status == "new"
        assert "needs tokens" in runs(known, tmp_path, ["dpo"], sets=[setting])[0].reason


def test_pairs_are_known_by_their_content(known, tmp_path):
    def planned(name: str, text: str):
        path = tmp_path / name / "pairs.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return runs(known, tmp_path, ["dpo"], "toy-tokens", sets=[f"dpo.pairs={path}"])[0].spec

    one, moved, changed = (
        planned(name, f"winner,loser\n{pair}\n")
        for name, pair in (("a", "ACG,ACT"), ("b", "ACG,ACT"), ("c", "ACG,AAA"))
    )
    assert one.params["pairs"] != moved.params["pairs"] and one.identity == moved.identity != changed.identity
    with pytest.raises(DavBenchError, match="cannot be read"):
        runs(known, tmp_path, ["dpo"], "toy-tokens", sets=["dpo.pairs=none.csv"])


def test_a_function_without_gradient_says_so_and_nes_gives_it_one(tmp_path):
    import torch

    from dav_bench.build import build_reward
    from dav_bench.core import Meter, MeteredReward

    path = tmp_path / "box.py"
    path.write_text(BLIND)
    (run,) = runs(catalog(), tmp_path, ["fav"], reward=f"{path}:blind", wrap="nes", sets=["nes.n=200"])
    x = torch.tensor([[0.5], [-1.0]], requires_grad=True)
    reward = build_reward(run.spec, "train")
    with pytest.raises(DavBenchError, match="--reward-wrap nes"):
        reward(x)
    assert reward(x.detach()).tolist() == [-0.25, -1.0]
    meter = Meter()
    wrapped = wrap_reward(run.spec, "train", MeteredReward(reward, meter))
    (slope,) = torch.autograd.grad(wrapped(x).sum(), x)
    assert torch.allclose(slope, -2 * x.detach(), atol=0.7) and meter.total("reward") == 2 * 401
    plain = replace(run.spec, rewards={"train": {"use": run.spec.rewards["train"]["use"]}})
    metered = MeteredReward(reward, meter)
    assert wrap_reward(plain, "train", metered) is metered
