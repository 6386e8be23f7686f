from dataclasses import replace

import pytest

from dav_bench.errors import DavBenchError
from dav_bench.spec import RunSpec, plain


@pytest.fixture
def spec():
    return RunSpec(
        task="dna",
        task_version=1,
        task_hash="abc",
        method="dav",
        params={"width": 4, "stop": None, "betas": (0.9, 0.999), "guide": True, "lr": 1e-4},
        model={"use": "mdlm-dna"},
        sampler={"steps": 64},
        rewards={"train": {"use": "gc"}, "heldout": {"use": "gc2"}},
        eval={"samples": 256, "seed": 20000},
        budget={"unit": "cost"},
        seed=3,
    )


def test_toml_round_trip_keeps_the_identity(spec):
    for one in (spec, replace(spec, search={"name": "tree", "params": {"width": 2, "x": None}})):
        again = RunSpec.from_toml(one.to_toml())
        assert again == one and again.identity == one.identity
        assert RunSpec.from_dict(one.to_dict()) == one


def test_seeds_share_the_run_id_and_nothing_else_does(spec):
    assert replace(spec, seed=4).run_id == spec.run_id
    assert replace(spec, seed=4).identity != spec.identity
    for change in (
        {"task": "x"},
        {"task_version": 2},
        {"task_hash": "y"},
        {"method": "dav-kl"},
        {"params": {**spec.params, "width": 5}},
        {"model": {"use": "other"}},
        {"sampler": {"steps": 65}},
        {"rewards": {"train": {"use": "gc"}}},
        {"eval": {"samples": 257, "seed": 20000}},
        {"budget": {"unit": "cost", "train": 5}},
        {"search": {"name": "tree", "params": {}}},
        {"heldout": False},
    ):
        assert replace(spec, **change).run_id != spec.run_id, change


def test_the_order_of_keys_does_not_matter(spec):
    turned = replace(spec, params=dict(reversed(list(spec.params.items()))))
    assert turned.identity == spec.identity


def test_label_base_and_directory(spec):
    searched = replace(spec, search={"name": "tree", "params": {}})
    assert (spec.label, searched.label) == ("dav", "dav+tree")
    assert searched.base() == spec
    assert searched.dirname == f"runs/dna/dav+tree/{searched.run_id}-s3"
    assert replace(spec, method="acme/dav").label == "acme~dav"


def test_a_reward_file_counts_by_content_not_by_place(spec):
    def with_reward(use, sha):
        return replace(spec, rewards={"train": {"use": use, "sha256": sha, "text": False}}).identity

    assert with_reward("./my.py:fn", "a") == with_reward("/else/where/my.py:fn", "a")
    assert with_reward("./my.py:fn", "a") != with_reward("./my.py:fn", "b")
    assert with_reward("./my.py:fn", "a") != with_reward("./my.py:other", "a")


def test_unknown_and_missing_keys_are_reported_together():
    with pytest.raises(DavBenchError) as err:
        RunSpec.from_dict({"task": "dna", "sead": 1})
    assert "did you mean 'seed'" in err.value.why and "missing key 'method'" in err.value.why


def test_only_plain_values_enter_a_specification(spec):
    with pytest.raises(TypeError):
        replace(spec, params={"f": print})
    assert plain({"a": None, "b": (1, {2})}) == {"a": "none", "b": [1, [2]]}


def test_not_a_number_has_no_identity(spec):
    with pytest.raises(ValueError):
        _ = replace(spec, params={"lr": float("nan")}).identity
