"""Plugins with a defect each: the check that is there for it fails, and the others do not hide it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dav_bench import plugins, testing
from dav_bench.testing.apart import examine_apart
from dav_bench.testing.imports import measure

HEAD = """
from dataclasses import dataclass
from dav_bench import hookimpl
from dav_bench.core.method import Method, Training

@dataclass(frozen=True)
class Settings(Training):
    '''Settings.'''
    lr: float = 1e-2
    '''Learning rate.'''

"""
SEARCH = (
    HEAD
    + """
class Search:
    requires = frozenset({"sample"})
    def __call__(self, ctx, noise, cond=None):
        import torch
        from dav_bench.core import Rollout
        batch = Rollout()(ctx, noise, cond)
        BODY
        return batch

@hookimpl
def register_methods(register):
    def build(config):
        from dav_bench.core import MaximumLikelihood
        return Method(Search(), MaximumLikelihood(), Training.of(config))
    register("planted", build, config=Settings, requires=("sample", "step.log_prob", "step.kl", "reference"),
             tunes=True, summary="a defect")
"""
)
LOSS = (
    HEAD
    + """
def build(config):
    import torch
    from dav_bench.core import Loss, Rollout
    class Planted(Loss):
        requires = frozenset({"step.log_prob"})
        calls = 0
        def __call__(self, ctx, item):
            step = ctx.policy.step(item.x, item.i, item.cond)
            value = -step.log_prob(item.x_next)
            BODY
            return value
    return Method(Rollout(), Planted(), Training.of(config))

@hookimpl
def register_methods(register):
    register("planted", build, config=Settings, requires=("sample", "step.log_prob"), tunes=True, summary="a defect")
"""
)
REWARD = """
import torch
from dav_bench import hookimpl
class Planted(torch.nn.Module):
    domain = "vector"
    provides = frozenset({"reward.grad"})
    def forward(self, sample, cond=None):
        BODY
def build():
    return Planted()
@hookimpl
def register_rewards(register):
    register("planted", build, provides="reward.grad", domain="vector", summary="a defect")
"""


def failed(name: str = "acme") -> dict[str, str]:
    return {c.name: c.note for c in testing.examine(name, timed=False).failed}


def planted(install, source: str, body: str = "pass") -> dict[str, str]:
    install("acme", {"acme": source.replace("BODY", body)}, "acme = acme")
    return failed()


def test_the_frames_themselves_are_sound(install):
    assert planted(install, SEARCH) == {}


def test_the_frame_of_the_losses_is_sound(install):
    assert planted(install, LOSS) == {}


UNCOUNTED = "ctx.policy.network(batch.states[0], torch.zeros(len(noise)))"
ELSEWHERE = "__import__('pathlib').Path('notes.txt').write_text('x')"


@pytest.mark.parametrize(
    ("body", "check", "note"),
    [
        (UNCOUNTED, "every network and reward row is counted", "rows of forward"),
        ("ctx.reward.reward(batch.states[-1], None)", "every network and reward row is counted", "rows of reward"),
        ("batch.states[-2] += torch.rand(1).to(batch.states)", "ends the same", "so do two whole runs"),
        (ELSEWHERE, "writes nowhere but in its run directory", "acme.py:"),
        ("1 / 0", "it runs on", "ZeroDivisionError"),
    ],
    ids=["network", "reward", "randomness", "writes", "raises"],
)  # fmt: skip
def test_a_search(install, body, check, note):
    found = planted(install, SEARCH, body)
    mixture = {name: why for name, why in found.items() if name.endswith("toy-mixture")}
    assert [why for name, why in mixture.items() if check in name and note in why], found


@pytest.mark.parametrize(
    ("body", "check", "note"),
    [
        ("value = value + step.kl(step).mean()", "uses no more than it declares", "step.kl"),
        ("value = value + step.tilt(0 * item.x_next[..., :4]).x0.sum() * 0", "uses no more", "step.tilt"),
        ("value = value + 0 * ctx.reference.predict(item.x, item.i).sum()", "uses no more", "reference"),
        ("type(self).calls += 1; value = value * type(self).calls", "ends the same", "differ"),
    ],
    ids=["kl", "tilt", "reference", "state"],
)
def test_a_loss(install, body, check, note):
    found = planted(install, LOSS, body)
    assert [why for name, why in found.items() if check in name and note in why], found


@pytest.mark.parametrize(
    ("body", "check", "note"),
    [
        ("return -(sample ** 2).sum(-1, keepdim=True)", "one finite value each", "(6, 1)"),
        ("return sample[:, 0] / 0", "one finite value each", "not finite"),
        ("return sample[:, 0] - sample.mean()", "its own sample alone", "moves by"),
        ("return sample[:, 0] + torch.randn(len(sample))", "its own sample alone", "moves by"),
        ("return (sample.detach() ** 2).sum(-1)", "slope of its value", "no graph"),
        ("return (sample ** 2 + sample.detach() ** 2).sum(-1)", "slope of its value", "finite differences"),
        ("sample *= 2; return sample.sum(-1)", "one finite value each", "in place"),
    ],
    ids=["shape", "infinite", "batch", "random", "detached", "gradient", "in-place"],
)
def test_a_reward(install, body, check, note):
    found = planted(install, REWARD, body)
    assert [why for name, why in found.items() if check in name and note in why], found


def test_settings_without_a_word(install):
    source = SEARCH.replace("    '''Learning rate.'''\n", "    wide: int = 3\n")
    assert "says nothing of wide" in planted(install, source)["method planted: every setting is documented"]


def test_a_name_that_is_taken_and_a_hook_that_is_none(install):
    found = planted(install, SEARCH.replace('"planted"', '"dav"'))
    assert "already registered by 'dav-bench'" in found["it loads"]
    plugins.reset()
    install("bad", {"bad": SEARCH.replace("register_methods", "register_method")}, "bad = bad")
    assert "did you mean 'register_methods'" in failed("bad")["it loads"]


TRACKER = """
from dav_bench import hookimpl
class Tracker:
    def NAME(self, event):
        BODY
@hookimpl
def register_trackers(register):
    register("planted", Tracker, summary="a defect")
"""


@pytest.mark.parametrize(
    ("name", "body", "check", "note"),
    [
        ("round_finish", "pass", "it hears something", "did you mean 'round_finished'"),
        ("round_finished", "event.no_such", "follows a run", "no_such"),
        ("run_finished", "open('log.txt', 'w').close()", "writes nowhere but", "log.txt"),
        ("run_started", "(event.run_dir / 'log.txt').write_text('x')", "", ""),
    ],
)
def test_a_tracker(install, name, body, check, note):
    found = planted(install, TRACKER.replace("NAME", name), body)
    assert (not found and not check) or [why for n, why in found.items() if check in n and note in why], found


def test_a_slow_import_and_a_heavy_one(install):
    slow = "import time; time.sleep(1.5)\n"
    install(
        "acme", {"slow_mod": slow, "heavy_mod": "import sys; sys.modules['torch'] = sys\n"}, "acme = slow_mod"
    )
    seconds, limit, _ = measure("slow_mod")
    assert seconds >= 1.5 and (seconds > limit or limit > 1.5)
    assert measure("heavy_mod")[2] == ["torch"]


def test_a_crash_and_a_hang_are_reported_after_what_was_checked(install):
    install("acme", {"acme": REWARD.replace("BODY", "import os; os._exit(7)")}, "acme = acme")
    checks = examine_apart("acme", seconds=120)
    assert checks[0].status == "ok" and checks[-1].status == "failed"
    assert "exit code 7 after" in checks[-1].note
    hang = ("-c", "import time; time.sleep(60)")
    assert "took more than 1 s" in examine_apart("acme", seconds=1, program=hang)[-1].note


def test_the_command_prints_a_checklist_with_fixes(install, tmp_path):
    source = TRACKER.replace('Tracker, summary="a defect"', "Tracker").replace("NAME", "run_started")
    source = source.replace("BODY", "pass")
    install("acme", {"acme": source}, "acme = acme")

    def check(*args):
        return subprocess.run(
            [sys.executable, "-m", "dav_bench", "plugins", "check", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = check("acme")
    assert done.returncode == 1 and "FAILED" in done.stdout and "Try: pass summary='one line'" in done.stdout
    rows = {row["name"]: row for row in json.loads(check("acme", "--json").stdout)}
    assert rows["tracker planted: it has a summary"]["status"] == "failed"
    assert rows["import takes less than 0.5 s"]["status"] == "ok"
    assert check("acm").returncode == 2
