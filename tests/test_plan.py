import fcntl
import json
import socket
from dataclasses import replace

import pytest

from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError
from dav_bench.layers import budget_layer, set_layers
from dav_bench.plan import UNTIL_SPENT, Request, fits, plan, trains
from dav_bench.plugins import catalog
from dav_bench.registry import Catalog, Entry
from dav_bench.tasks import find_task, read_task

TASK = """
schema = 1
name = "t"
version = 1
model.use = "seq"
reward.train = "smooth"
reward.heldout = "smooth"
sampler.steps = 8
sampler.eta = 1
method.dav.width = 6
preset.paper.sampler.steps = 16
preset.paper.method.dav.width = 10
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.toml").write_text(TASK)
    return read_task(tmp_path)


@pytest.fixture
def known():
    """The built-in methods over models and rewards that give what a test wants."""
    made = Catalog()
    for entry in catalog():
        made.add(entry)
    give = ("sample", "step", "step.log_prob", "step.tilt", "step.kl", "reference")
    made.add(Entry("models", "seq", "x:y", provides=give, domain="sequence"))
    made.add(
        Entry("models", "ode", "x:y", provides=("sample", "step", "step.log_prob if eta"), domain="sequence")
    )
    made.add(Entry("rewards", "smooth", "x:y", provides=("reward.grad",), domain="sequence"))
    made.add(Entry("rewards", "blackbox", "x:y", domain="sequence"))
    made.add(Entry("rewards", "picture", "x:y", domain="image"))
    return made


def runs(known, task, methods=("dav",), sets=(), **options):
    (layer,) = set_layers(sets, known)
    return plan(Request(methods, [task], layers=[layer], **options), known, out=task.folder / "results")


def labels(planned):
    return [r.spec.label for r in planned]


def test_a_method_comes_with_baselines_and_test_time_search(known, task):
    planned = runs(known, task, seeds=[0, 1])
    assert [(r.spec.label, r.spec.seed) for r in planned] == [
        ("pretrained", 0),
        ("dav", 0),
        ("dav+tree", 0),
        ("dav", 1),
        ("dav+tree", 1),
    ]
    assert planned[2].base == planned[1].spec
    assert {r.status for r in planned} == {"new"}


def test_search_can_be_another_or_none(known, task):
    assert labels(runs(known, task, search=None, baselines=False)) == ["dav"]
    assert labels(runs(known, task, search="best-of", baselines=False)) == ["dav", "dav+best-of"]
    assert labels(runs(known, task, methods=["svdd"], search="tree", baselines=False)) == ["svdd"]


def test_test_time_search_takes_its_settings_from_the_method(known, task):
    tuned = runs(known, task, sets=["dav.alpha=0.7"], baselines=False)[1]
    assert (tuned.spec.search["params"]["width"], tuned.spec.search["params"]["alpha"]) == (6, 0.7)
    assert tuned.sources["search.width"] == "dav"
    wider = runs(known, task, sets=["search.width=9"], baselines=False)[1]
    assert wider.spec.search["params"]["width"] == 9 and wider.spec.params["width"] == 6


def test_layers_and_their_sources(known, task):
    run = runs(known, task, preset="paper", sets=["dav.lr=0.5", "sampler.steps=4"])[1]
    assert (run.spec.params["width"], run.spec.params["lr"], run.spec.sampler["steps"]) == (10, 0.5, 4)
    assert run.sources["method.width"] == "preset paper"
    assert run.sources["method.lr"] == "--set"
    assert run.sources["method.gamma"] == "default"
    assert run.sources["sampler.eta"] == "task file"
    with pytest.raises(DavBenchError, match="did you mean 'paper'"):
        runs(known, task, preset="papr")


def test_method_dot_key_reaches_every_method_that_has_it(known, task):
    planned = runs(known, task, methods=["dav", "svdd"], sets=["method.width=3", "svdd.width=2"], search=None)
    assert {r.spec.method: r.spec.params.get("width") for r in planned} == {
        "pretrained": None,
        "dav": 3,
        "svdd": 2,
    }


def test_all_mistakes_are_reported_once(known, task):
    bad = ["method.widht=8", "dav.alpha=x", "davv.x=1", "svdd.width=3", "sampler.step=1", "eval.samples=1.5"]
    with pytest.raises(DavBenchError) as err:
        runs(known, task, sets=bad)
    why = err.value.why
    assert why.count("\n") == 5
    for part in (
        "no method of this command has it; did you mean 'width'",
        "expected float, got 'x'",
        "unknown section; did you mean 'dav'",
        "'svdd' is not part of this command",
        "did you mean 'steps'",
        "expected int, got '1.5'",
    ):
        assert part in why, part


def test_integers_in_a_task_file_may_become_fractions(known, task):
    assert runs(known, task, sets=["sampler.eta=0.5"])[0].spec.sampler["eta"] == 0.5


def test_a_black_box_reward_refuses_guidance_and_says_how_to_go_on(known, task):
    planned = runs(known, task, reward="blackbox", sets=["dav.guide=true"])
    refused = {r.spec.label: r for r in planned if r.status == "skip"}
    assert set(refused) == {"dav", "dav+tree"}
    assert refused["dav"].reason == "'dav' needs reward.grad; reward 'blackbox' does not give it"
    assert refused["dav"].fix == "--set dav.guide=false"
    assert not [
        r for r in runs(known, task, reward="blackbox", sets=["dav.guide=false"]) if r.status == "skip"
    ]


def test_what_does_not_fit_a_task_comes_with_the_reason_and_a_way_out(known, task):
    blind = replace(task, rewards={"train": {"use": "blackbox"}})
    dav, svdd, real = (known.get("methods", name) for name in ("dav", "svdd", "real"))
    assert fits(dav, task, known) == fits(svdd, blind, known) == ("", "")
    reason, fix = fits(dav, blind, known)
    assert reason == "'dav' needs reward.grad; reward 'blackbox' does not give it" and fix
    assert fits(real, task, known)[0] == "'real' needs data; model 'seq' does not give it"
    broken = replace(task, methods={"dav": {"widht": 2}})
    assert "did you mean 'width'" in fits(dav, broken, known)[0]
    assert [trains(e) for e in (dav, svdd, real)] == [True, False, False]


def test_a_model_may_give_a_capability_on_a_condition(known, task):
    sets = ["model.use=ode", "dav.guide=false"]
    assert "step.log_prob" not in runs(known, task, sets=sets)[1].reason
    assert "step.log_prob" in runs(known, task, sets=[*sets, "sampler.eta=0"])[1].reason


def test_domains_must_agree(known, task):
    refused = runs(known, task, reward="picture")[1]
    assert refused.status == "skip" and "scores image" in refused.reason


def test_real_samples_need_data(known, task):
    refused = runs(known, task, methods=["real"])[-1]
    assert (
        refused.spec.label == "real" and refused.reason == "'real' needs data; model 'seq' does not give it"
    )


def test_a_pair_without_code(known, task):
    planned = runs(
        known, task, methods=(), pair=("best-of", "forward-kl"), sets=["searcher.n=7", "training.rounds=2"]
    )
    assert labels(planned) == ["pretrained", "best-of_forward-kl", "best-of_forward-kl+best-of"]
    params = planned[1].spec.params
    assert params["searcher"] == {"name": "best-of", "params": {"n": 7}}
    assert params["trainer"]["name"] == "forward-kl" and params["training"]["rounds"] == 2


def test_no_heldout_leaves_the_role_out(known, task):
    spec = runs(known, task, heldout=False)[0].spec
    assert set(spec.rewards) == {"train"} and spec.heldout is False


def test_a_reward_file_is_known_by_content_without_running_it(known, task, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit\ndef fn(sequences):\n    return [1.0]\ndef soft(x, cond): return x\n")
    spec = runs(known, task, reward=f"{file}:fn", sets=["dav.guide=false"])[1].spec
    assert spec.rewards["train"]["text"] is True and len(spec.rewards["train"]["sha256"]) == 16
    assert runs(known, task, reward=f"{file}:fn", sets=["dav.guide=true"])[1].fix == "--set dav.guide=false"
    assert runs(known, task, reward=f"{file}:soft", sets=["dav.guide=true"])[1].status == "new"
    with pytest.raises(DavBenchError, match="defines no function 'no'"):
        runs(known, task, reward=f"{file}:no")
    with pytest.raises(DavBenchError, match="cannot be read"):
        runs(known, task, reward=f"{tmp_path}/none.py:fn")


def put(run, status, checkpoint=False):
    (run.path / "checkpoints").mkdir(parents=True)
    meta = {"schema": 1, "identity": {"version": 1, "hash": run.spec.identity}, "label": run.spec.label}
    meta |= {"task": run.spec.task, "seed": run.spec.seed, "meter": {}, "host": socket.gethostname()}
    (run.path / "run.json").write_text(json.dumps({**meta, "status": status}))
    if checkpoint:
        (run.path / "checkpoints" / "last.json").write_text("{}")


def test_a_run_that_another_process_writes_is_left_alone(known, task):
    put(run := runs(known, task)[1], "running", checkpoint=True)
    with (run.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        planned = runs(known, task)[1]
    assert planned.status == "skip" and "another process" in planned.reason


@pytest.mark.parametrize(
    ("status", "checkpoint", "planned"),
    [
        ("done", False, "cached"),
        ("interrupted", True, "resumable"),
        ("interrupted", False, "new"),
        ("running", True, "resumable"),  # nobody owns it: it was killed
        ("nan", True, "resumable"),
    ],
)
def test_what_lies_on_disk_decides_the_status(known, task, status, checkpoint, planned):
    put(runs(known, task)[1], status, checkpoint)
    assert runs(known, task)[1].status == planned
    (layer,) = set_layers([], known)
    fresh = plan(Request(["dav"], [task], layers=[layer]), known, task.folder / "results", fresh=True)
    assert fresh[1].status == "new"


@pytest.mark.parametrize(
    ("text", "unit", "train"),
    [("20000", "cost", 20000), ("cost=2e4", "cost", 20000), ("reward=5_000", "reward", 5000),
     ("seconds=60", "seconds", 60), (" seconds = 0.5", "seconds", 0.5)],
)  # fmt: skip
def test_a_budget_is_an_amount_in_a_unit(known, task, text, unit, train):
    made = plan(Request(["dav"], [task], layers=[budget_layer(text)]), known, task.folder / "results")
    spec = made[1].spec
    assert spec.budget == {"unit": unit, "train": train} and type(spec.budget["train"]) is type(train)
    assert spec.reproducible == (unit != "seconds")


@pytest.mark.parametrize(
    ("text", "message"),
    [("rewards=5", "unknown unit 'rewards'; did you mean 'reward'"), ("cost=", "whole number of rows"),
     ("cost=0", "above 0"), ("cost=-5", "above 0"), ("1.5", "whole number"), ("reward=x", "got 'x'"),
     ("seconds=inf", "seconds above 0"), ("seconds=nan", "seconds above 0"), ("a=b=3", "unknown unit 'a=b'")],
)  # fmt: skip
def test_a_bad_budget_is_one_clear_error(text, message):
    with pytest.raises(DavBenchError, match=message) as err:
        budget_layer(text)
    assert "cost=20000" in err.value.fix


def test_a_bad_budget_by_setting_is_an_error_too(known, task):
    for sets, message in (
        (["budget.train=0"], "must be above 0"),
        (["budget.train=1.5"], "counted in whole rows"),
        (["budget.unit=hours", "budget.train=1"], "is none of 'cost' | 'reward' | 'seconds'"),
    ):
        with pytest.raises(DavBenchError) as err:
            runs(known, task, sets=sets)
        assert message in err.value.why


def test_a_budget_alone_ends_training_unless_the_command_sets_rounds(known, task):
    def rounds(*sets, **options):
        return runs(known, task, sets=sets, baselines=False, **options)[0].spec.params["rounds"]

    default = rounds()
    assert rounds("budget.train=500") == UNTIL_SPENT != default
    assert rounds("budget.train=500", preset="paper") == UNTIL_SPENT
    assert rounds("budget.train=500", "dav.rounds=7") == 7
    (run, _) = runs(known, task, sets=["budget.train=500"], baselines=False)
    assert run.sources["method.rounds"] == "--set"
    (pair, _) = runs(
        known, task, methods=(), pair=("tree", "forward-kl"), sets=["budget.train=5"], baselines=False
    )
    assert pair.spec.params["training"]["rounds"] == UNTIL_SPENT


def test_what_trains_nothing_is_the_same_run_under_any_budget(known, task):
    free = runs(known, task, methods=["svdd"])
    for text in ("budget.train=500", "budget.unit=seconds"):
        paid = runs(known, task, methods=["svdd"], sets=[text])
        assert [r.spec.identity for r in free] == [r.spec.identity for r in paid]


def test_the_order_of_methods_changes_no_run(known, task):
    one, two = (runs(known, task, methods=m) for m in (["dav", "svdd"], ["svdd", "dav"]))
    assert {r.spec.identity for r in one} == {r.spec.identity for r in two}


def test_compat_follows_the_domain_of_the_task(known, task):
    run = runs(known, task, sets=["dav.compat=release"])[1]
    assert run.spec.params["target"] == "lookahead"
    assert run.sources["method.target"] == "--set (compat=release)"


def test_presets_of_shipped_tasks_resolve():
    found = catalog()
    for name in ("dna", "toy-mixture", "toy-tokens"):
        task = find_task(name)
        for preset in (None, *task.presets):
            for run in plan(Request(["dav", "dav-kl", "svdd", "best-of-n"], [task], preset=preset), found):
                assert run.status != "skip", (name, preset, run.spec.label, run.reason)


def test_a_search_takes_over_settings_that_mean_the_same_alone(tmp_path):
    """`drakes.last` counts steps, `tree.last` names a way to end."""
    sets = ["drakes.last=3", "drakes.alpha=0.7"]
    runs = planned(methods=["drakes"], tasks=["toy-tokens"], sets=sets, out=tmp_path)
    (search,) = (run.spec.search for run in runs if run.spec.search)
    assert search["params"]["last"] == "sample"
    assert search["params"]["alpha"] == 0.7


def test_exact_samples_are_left_out_where_a_reward_of_ones_own_states_no_bound(tmp_path):
    """Gaussian worlds draw them by rejection, which needs a bound; tokens are enumerated."""
    file = tmp_path / "own.py"
    file.write_text("def score(sample, cond):\n    return sample.flatten(1).sum(-1)\n")
    for task, status in (("toy-mixture", "skip"), ("toy-tokens", "new")):
        runs = planned(methods=["best-of-n"], tasks=[task], reward=f"{file}:score", out=tmp_path / "out")
        assert {run.spec.label: run.status for run in runs} == {
            "exact": status,
            "pretrained": "new",
            "best-of-n": "new",
        }
