"""Prompts: where their texts come from, and how samples are dealt them."""

from collections import Counter

import pytest

from dav_bench.errors import DavBenchError
from dav_bench.layers import set_layers
from dav_bench.plan import Request, plan
from dav_bench.plugins import catalog
from dav_bench.prompts import Prompts, read, resolved
from dav_bench.spec import RunSpec
from dav_bench.tasks import find_task

FIVE = Prompts(("a", "b", "c", "d", "e"), ("d", "z"), 3)


def test_texts_are_those_of_training_then_the_rest():
    assert FIVE.texts == ["a", "b", "c", "d", "e", "z"]


def test_a_round_deals_each_prompt_in_a_row_and_none_twice_before_all_have_come():
    numbers = FIVE.training(21, seed=7).tolist()
    groups = [numbers[k : k + 3] for k in range(0, 21, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups[:5]) == [0, 1, 2, 3, 4]
    assert len(numbers) == 21 and 5 not in numbers  # `z` is evaluated only


def test_rounds_differ_and_every_prompt_is_as_likely():
    firsts = Counter(FIVE.training(1, seed=seed)[0].item() for seed in range(1000))
    assert set(firsts) == {0, 1, 2, 3, 4}
    assert all(abs(count - 200) < 4 * 12.65 for count in firsts.values())  # sd of a binomial of 1000, 1/5
    assert FIVE.training(15, 3).tolist() == FIVE.training(15, 3).tolist()


def test_evaluated_samples_take_the_prompts_in_turn_and_more_of_them_begin_alike():
    assert FIVE.evaluation(5).tolist() == [3, 5, 3, 5, 3]
    assert FIVE.evaluation(3, start=1).tolist() == [5, 3, 5]


def test_the_sheet_shows_what_is_trained_on_and_not_evaluated():
    assert FIVE.others(2).tolist() == [0, 0, 1, 1, 2, 2, 4, 4]
    assert Prompts(("a",), ("a",)).others(2).tolist() == Prompts().others(2).tolist() == []


def test_without_prompts_there_are_no_conditions():
    assert not Prompts() and Prompts().training(4, 0) is None and Prompts().evaluation(4) is None


def test_a_file_holds_one_prompt_a_line(tmp_path):
    (tmp_path / "mine.txt").write_text("# animals\ntiger\n\n red apple \n")
    assert read(["mine.txt"], [tmp_path], "prompts.train") == ["tiger", "red apple"]


@pytest.mark.parametrize(
    ("items", "text"),
    [(["none.txt"], "there is no file"), (["empty.txt"], "holds no prompt"), (["a", " "], "a prompt is empty")],
)
def test_unusable_prompts_are_named(items, text, tmp_path):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(DavBenchError, match=text):
        read(items, [tmp_path], "prompts.eval")


def test_training_prompts_are_evaluated_where_no_others_are_named(tmp_path):
    values = {"train": ("a", "b"), "eval": (), "repeat": 8}
    assert resolved(values, {}, tmp_path) == {"train": ["a", "b"], "eval": ["a", "b"], "repeat": 8}
    assert resolved({**values, "train": ()}, {}, tmp_path) == {}


def test_the_task_file_reads_its_own_folder_and_the_user_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "p.txt").write_text("of the task")
    (tmp_path / "p.txt").write_text("of the user")
    monkeypatch.chdir(tmp_path)
    values = {"train": ("p.txt",), "eval": (), "repeat": 8}
    assert resolved(values, {"train": "task file"}, tmp_path / "task")["train"] == ["of the task"]
    assert resolved(values, {"train": "--set"}, tmp_path / "task")["train"] == ["of the user"]


def test_prompts_are_part_of_the_identity_and_absent_ones_leave_it_as_it_was():
    bare = RunSpec("t", 1, "h", "dav")
    asked = RunSpec("t", 1, "h", "dav", prompts={"train": ["a"], "eval": ["a"], "repeat": 8})
    assert "prompts" not in bare.to_dict() and asked.identity != bare.identity
    assert RunSpec.from_toml(asked.to_toml()) == asked


def test_prompts_for_a_model_that_reads_no_text_are_refused():
    layers = set_layers(["prompts.train=tiger,owl"], catalog())
    with pytest.raises(DavBenchError, match="reads no text"):
        plan(Request(["dav"], [find_task("toy-tokens")], layers=layers), catalog())
