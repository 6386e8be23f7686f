import shutil

import pytest

from dav_bench import tasks
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.layers import task_layers
from dav_bench.plugins import catalog
from dav_bench.tasks import check_task, find_task, read_task

TASK = """
schema = 1
name = "mine"
version = 1
title = "Mine"
assets = ["weights/*.bin"]
model.use = "toy-tokens"
reward.train = "toy-tokens"
reward.heldout = { use = "toy-tokens" }
metrics.quality = ["reward", "reward-heldout", "gap"]
sampler.steps = 8
method.width = 3
method.dav.width = 5
preset.paper.sampler.steps = 16
preset.paper.method.dav.alpha = 0.5
"""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "tasks" / "mine"
    (made / "weights").mkdir(parents=True)
    (made / "weights" / "a.bin").write_bytes(b"one")
    (made / "task.toml").write_text(TASK)
    return made


@pytest.fixture(autouse=True)
def rescan():
    yield
    tasks._scan.cache_clear()


def rewrite(folder, old, new):
    text = (folder / "task.toml").read_text()
    assert old in text
    (folder / "task.toml").write_text(text.replace(old, new))
    return read_task(folder)


def test_a_task_file_is_read(folder):
    task = read_task(folder, "here")
    assert (task.name, task.version, task.origin) == ("mine", 1, "here")
    assert task.rewards == {"train": {"use": "toy-tokens"}, "heldout": {"use": "toy-tokens"}}
    assert task.baselines == ("pretrained",)
    check_task(task, catalog())


def test_every_mistake_is_reported_at_once(folder):
    bad = """
schema = 2
name = "No Such"
version = "1"
titel = "x"
model = {}
reward.trian = "x"
metrics.qualty = []
baselines = "pretrained"
preset.paper.samplr = {}
"""
    (folder / "task.toml").write_text(bad)
    with pytest.raises(DavBenchError) as err:
        read_task(folder)
    for part in (
        "schema must be 1",
        "small letters",
        "version: expected int",
        "did you mean 'title'",
        "model.use must name",
        "did you mean 'train'",
        "reward.train must name a reward",
        "did you mean 'quality'",
        "baselines: expected",
        "did you mean 'sampler'",
    ):
        assert part in err.value.why, part


EXACT = """
schema = 1
name = "known"
version = 1
model.use = "toy-tokens"
reward.train = "toy-tokens"
reward.exact = true
target.alpha = 0.5
metrics.quality = ["reward", "target-distance"]
"""


def test_a_task_whose_reward_is_the_truth(folder):
    (folder / "task.toml").write_text(EXACT)
    task = read_task(folder)
    assert task.exact and task.target == {"alpha": 0.5} and set(task.rewards) == {"train"}
    check_task(task, catalog())
    assert task_layers(task, None)[0].sections["exact"] == {"alpha": 0.5}, (
        "exact samples are those of this target"
    )
    hashes = {
        task.hash,
        *(rewrite(folder, *change).hash for change in (("0.5", "0.6"), ("exact = true", "exact = false"))),
    }
    assert len(hashes) == 3


def test_what_contradicts_an_exact_reward_is_reported(folder):
    bad = EXACT.replace('["reward"', '["gap"').replace("0.5", "0") + 'reward.heldout = "toy-tokens"\n'
    (folder / "task.toml").write_text(bad)
    with pytest.raises(DavBenchError) as err:
        read_task(folder)
    for part in ("'gap' needs a held-out reward", "nothing can be held out", "temperature above 0, got 0"):
        assert part in err.value.why, part
    (folder / "task.toml").write_text(EXACT.replace("true", '"yes"').replace("alpha", "alfa"))
    with pytest.raises(DavBenchError) as err:
        read_task(folder)
    for part in ("reward.exact: expected true or false", "target.alfa: unknown key; did you mean 'alpha'"):
        assert part in err.value.why, part


def test_metrics_of_a_target_need_its_temperature(folder):
    (folder / "task.toml").write_text(EXACT.replace("target.alpha = 0.5", ""))
    with pytest.raises(DavBenchError) as err:
        check_task(read_task(folder), catalog())
    assert "'target-distance' needs target.alpha" in err.value.why


def test_broken_toml_names_the_file(folder):
    (folder / "task.toml").write_text("name = ")
    with pytest.raises(DavBenchError, match=r"task\.toml cannot be read"):
        read_task(folder)


def test_names_are_checked_against_the_catalogue(folder):
    task = rewrite(folder, 'model.use = "toy-tokens"', 'model.use = "toy-token"\nrank.by = ["rewrd"]')
    with pytest.raises(DavBenchError) as err:
        check_task(task, catalog())
    assert "did you mean 'toy-tokens'" in err.value.why
    assert "rank: 'rewrd' is no metric of this task; did you mean 'reward'" in err.value.why


def test_the_hash_follows_what_is_measured(folder):
    first = read_task(folder).hash
    assert rewrite(folder, 'title = "Mine"', 'title = "Other"').hash == first
    assert rewrite(folder, "method.width = 3", "method.width = 4").hash == first
    assert rewrite(folder, 'quality = ["reward",', 'quality = ["gap", "reward",').hash != first
    (folder / "weights" / "a.bin").write_bytes(b"two")
    assert read_task(folder).hash not in (first,)


def test_digest_follows_every_byte(folder):
    first = read_task(folder).digest
    assert rewrite(folder, 'title = "Mine"', 'title = "Other"').digest != first


def test_a_missing_asset_is_named(folder):
    (folder / "weights" / "a.bin").unlink()
    with pytest.raises(DavBenchError) as err:
        _ = read_task(folder).hash
    assert err.value.code == ExitCode.MISSING and "weights/*.bin" in err.value.what


def test_here_comes_before_the_environment_before_shipped(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "else"
    shutil.copytree(folder, elsewhere / "mine")
    monkeypatch.setenv("DAV_BENCH_TASKS", str(elsewhere))
    monkeypatch.chdir(tmp_path)
    assert find_task("mine").origin == "./tasks"
    assert tasks.all_tasks().notices == ()  # equal copies are one task
    assert find_task("toy-tokens").origin == "shipped"
    tasks._scan.cache_clear()
    rewrite(folder, 'title = "Mine"', 'title = "Other"')
    assert find_task("mine").title == "Other"
    assert tasks.all_tasks().notices == (
        "task 'mine' of ./tasks shadows a different one of $DAV_BENCH_TASKS",
    )


def test_a_broken_task_breaks_no_other(folder, tmp_path, monkeypatch):
    (folder / "task.toml").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    assert find_task("toy-tokens").name == "toy-tokens"
    with pytest.raises(DavBenchError, match="'mine' cannot be used"):
        find_task("mine")
    with pytest.raises(DavBenchError, match="did you mean 'toy-tokens'"):
        find_task("toy-token")


def test_shipped_tasks_are_valid(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = tasks.all_tasks()
    assert not found.broken and {"dna", "tfbind8", "toy-mixture", "toy-ring", "toy-tokens"} <= set(
        found.found
    )
    for task in found.found.values():
        check_task(task, catalog())


def test_a_ranking_that_cannot_be_followed_is_named(folder):
    ranks = ["rank.gates = { reward = 'high' }", "rank.bye = ['reward']", "rank.reference = { beauty = 1 }"]
    wrong = "\n".join(['model.use = "toy-tokens"', *ranks])
    task = rewrite(folder, 'model.use = "toy-tokens"', wrong)
    with pytest.raises(DavBenchError) as err:
        check_task(task, catalog())
    for part in ("the gate reward 'high' is no condition", "rank.bye: unknown key", "'beauty' is no metric"):
        assert part in err.value.why
