"""Settings of the methods that train on own rollouts: what they select, and what is refused before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dav_bench.builtin.methods import DDPO, DPOK, GRPO, RWR, VIDD, VMPO
from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError
from dav_bench.plugins import catalog

METHODS = ("ddpo", "dpok", "grpo", "rwr", "vidd", "vmpo")


def plan(method: str, *sets: str, task: str = "toy-tokens", out: Path = Path("none")):
    (run,) = planned(methods=[method], tasks=[task], sets=list(sets), out=out, baselines=False, search=None)
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["toy-tokens", "toy-mixture", "dna"])
def test_they_fit_chains_of_any_kind(method, task):
    run = plan(method, task=task)
    assert run.status == "new", run.reason
    loss = catalog().get("methods", method).build(run.spec.params).loss
    assert loss.requires <= {"step.log_prob", "step.kl", "reference"}


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_without_probabilities_is_refused_with_the_way_out(method):
    run = plan(method, "sampler.eta=0", task="toy-mixture")
    assert run.status == "skip" and "step.log_prob" in run.reason
    assert run.fix == "--set sampler.eta=1"


def test_denoising_needs_no_probabilities():
    run = plan("rwr", "sampler.eta=0", "rwr.target=denoise", task="toy-mixture")
    assert run.status == "new", run.reason


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["grpo.samples=20"], "multiple of group"),
        (["grpo.group=1"], "group to 2 or more"),
        (["ddpo.form=sf", "ddpo.updates=2"], "set updates to 1"),
        (["dpok.form=sf"], "set updates to 1"),
        (["ddpo.clip_ratio=0"], "lets no ratio change"),
        (["ddpo.min_count=40"], "never reached"),
        (["rwr.alpha=0"], "above 0"),
        (["rwr.best=0"], "above 0"),
        (["vidd.refresh=0"], "above 0"),
        (["vmpo.alpha=-1"], "above 0"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_at_planning(sets, message):
    with pytest.raises(DavBenchError) as err:
        plan(sets[0].split(".")[0], *sets)
    assert message in err.value.why


@pytest.mark.parametrize("method", METHODS)
def test_settings_shared_with_a_test_time_search_have_its_values(method):
    runs = planned(
        methods=[method], tasks=["toy-tokens"], sets=[], out=Path("none"), baselines=False, search="tree"
    )
    assert [run.status for run in runs] == ["new", "new"], runs[1].reason
    assert runs[1].spec.search["name"] == "tree"


def test_the_release_is_selected_by_the_kind_of_data():
    tokens, vectors = (
        plan("ddpo", "ddpo.compat=release", task=t).spec.params for t in ("toy-tokens", "toy-mixture")
    )
    assert (tokens["ratio"], tokens["old"], tokens["tracker"], tokens["reduce"]) == (
        "clean",
        "lagged",
        False,
        "mean",
    )
    assert tokens["clip_advantage"] == "none"
    assert (vectors["ratio"], vectors["old"], vectors["tracker"], vectors["reduce"]) == (
        "exact", "sampler", True, "mean")  # fmt: skip
    found = {m: plan(m, f"{m}.compat=release").spec.params for m in ("dpok", "grpo", "vmpo")}
    assert (found["dpok"]["weight"], found["grpo"]["std"], found["vmpo"]["potential"]) == (
        100.0,
        "batch",
        "policy",
    )


def test_what_is_built_follows_the_settings():
    from dav_bench.builtin.methods import policy, weighted

    made = policy.ddpo(DDPO())
    assert made.search.log_prob and made.loss.epsilon == 0.2 and made.loss.advantage.window == 32
    assert not policy.ddpo(DDPO(ratio="clean", old="lagged")).search.log_prob, "such ratios are replayed"
    assert policy.dpok(DPOK(clip_ratio=0.3)).loss.epsilon == 0.3
    assert policy.grpo(GRPO(reduce="mean")).loss.epsilon == 1e-4
    assert weighted.rwr(RWR(weighting="sparse", best=0.3)).loss.weights.keep == 0.3
    vidd = weighted.vidd(VIDD())
    assert vidd.search.on == "old" and vidd.search.value is not None and not vidd.search.log_prob
    vidd = weighted.vidd(VIDD(prior="ref"))
    assert vidd.search.value is None and vidd.search.log_prob
    vmpo = weighted.vmpo(VMPO(alpha=0.25))
    assert (vmpo.loss.scale, vmpo.search.value) == (4.0, None) and vmpo.loss.value is not None
    vmpo = weighted.vmpo(VMPO(potential="policy"))
    assert vmpo.search.value is not None and vmpo.loss.value is None
    assert weighted.vmpo(VMPO(form="r2g")).loss.value is None
