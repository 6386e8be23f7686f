"""The particle searches as users meet them: settings, what a plan refuses, and what they make of a tuned model."""

from dataclasses import fields

import pytest

from dav_bench.builtin import particles
from dav_bench.config import docs_of, resolve
from dav_bench.layers import set_layers
from dav_bench.plan import Request, plan
from dav_bench.plugins import catalog
from dav_bench.registry import active
from dav_bench.tasks import find_task

NAMES = ("smc", "tds", "das", "fk", "guidance")


def planned(method, *sets, task="toy-mixture", **options):
    (layer,) = set_layers(sets, catalog())
    request = Request([method], [find_task(task)], layers=[layer], baselines=False, **options)
    return plan(request, catalog(), fresh=True)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_method_and_a_searcher_with_the_same_settings(name):
    method, searcher = catalog().get("methods", name), catalog().get("searchers", name)
    assert method.config is searcher.config and method.requires == searcher.requires
    assert method.search == name and method.paper and not method.tunes
    assert all(docs_of(method.config).get(f.name) for f in fields(method.config))
    assert method.build().search == searcher.build()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("anchor", ["policy", "ref"])
def test_what_a_registration_requires_is_what_is_built(name, anchor):
    entry = catalog().get("searchers", name)
    values = {"anchor": anchor} if name != "guidance" else {}
    assert entry.build(values).requires == active(entry.requires, vars(entry.settings(values)))


@pytest.mark.parametrize("name", NAMES)
def test_a_deterministic_sampler_is_refused_with_the_way_out(name):
    (run,) = planned(name, "sampler.eta=0")
    assert run.status == "skip" and "sampler.eta=0" in run.reason
    assert run.fix == "--set sampler.eta=1"
    for sets in (["sampler.eta=0.5"], []):
        assert planned(name, *sets)[0].status == "new"
    assert planned(name, task="toy-tokens")[0].status == "new", "tokens have no eta"


def test_a_black_box_reward_runs_without_gradients_alone(tmp_path):
    path = tmp_path / "box.py"
    path.write_text("def box(sequences):\n    return [s.count('A') for s in sequences]\n")
    status = {n: planned(n, task="toy-tokens", reward=f"{path}:box")[0].status for n in NAMES}
    assert status == {"smc": "new", "fk": "new", "tds": "skip", "das": "skip", "guidance": "skip"}


@pytest.mark.parametrize("name", NAMES)
def test_a_search_on_a_tuned_model_takes_what_it_shares_with_the_method(name):
    """The temperature and the look-ahead; DAV's discount is no rate of tempering and does not pass as one."""
    runs = planned(
        "dav", "dav.alpha=0.3", "dav.gamma=0.9", "dav.compat=release", task="toy-tokens", search=name
    )
    assert [r.spec.label for r in runs] == ["dav", f"dav+{name}"]
    held = runs[1].spec.search["params"]
    assert held.get("alpha", 0.3) == 0.3
    assert held.get("ramp", "none") == "none"


def test_released_code_is_one_setting_away():
    for kind in ("image", "vector", "sequence"):
        (layer,) = set_layers(["fk.compat=release"], catalog())
        found = resolve(particles.FK, [layer], ["fk"], kind).values
        search = particles.fk(particles.FK(**found))
        assert (search.potential.terminal, search.potential.floor, search.potential.clamp) == (
            "release",
            0.0,
            1e10,
        )
        last = "survivor" if kind == "sequence" else "survivor-if-due"
        assert (search.skipped, search.order, search.output) == ("drop", "propose-first", last)
        assert (found["lookahead"] == "draws") == (kind == "sequence")
        (layer,) = set_layers(["das.compat=release"], catalog())
        found = resolve(particles.DAS, [layer], ["das"], kind).values
        search = particles.das(particles.DAS(**found))
        assert (search.output, search.carry) == ("heaviest", "state")
    assert particles.fk(particles.FK(lookahead="draws")).value.alpha == 0.1
    assert particles.fk(particles.FK(lookahead="draws", soften=1.0)).value.alpha == 1.0


def test_settings_reach_the_search():
    das = particles.das(particles.DAS(tempering="adaptive", ess=0.3, strength=2.0, tilt="letters", alpha=0.2))
    assert (das.tempering.kind, das.tempering.level, das.ess) == ("adaptive", 0.3, 0.3)
    assert (das.strength, das.rate, das.alpha, das.guide) == (2.0, False, 0.2, True)
    assert particles.das(particles.DAS(ess=1.0)).tempering.level == 0.5
    smc = particles.smc(particles.SMC(lookahead="rollout", draws=3, alpha=0.2, resampler="ssp", anchor="ref"))
    assert (smc.value.k, smc.value.alpha, smc.value.jump) == (3, 0.2, False)
    assert (smc.resampler, smc.anchor, smc.guide) == ("ssp", "ref", False)
    guided = particles.guidance(particles.Guidance(scale=3.0, tilt="letters"))
    assert (guided.scale, guided.rate, guided.value.lookahead) == (3.0, False, "mean")
