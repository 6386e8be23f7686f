import pytest
import torch

from dav_bench.build import build_method, build_reward, file_reward, inspect_reward
from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError

ACGT = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2]]), 4).float()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import math\n"
        "def text(sequences): return [s.count('G') for s in sequences]\n"
        "def soft(sample, cond=None): return sample[..., 2].sum(-1)\n"
        "def wrong(sequences): return [1.0]\n"
    )
    return path


def test_a_text_reward_sees_letters_and_gives_no_gradient(source):
    reward = file_reward(f"{source}:text")
    assert reward(ACGT).tolist() == [1.0, 4.0] and reward(ACGT).dtype == torch.float32
    assert reward.provides == frozenset() and reward.domain == "sequence"


def test_a_tensor_reward_is_differentiable(source):
    reward = file_reward(f"{source}:soft", domain="sequence")
    x = ACGT.clone().requires_grad_(True)
    reward(x).sum().backward()
    assert x.grad is not None and x.grad.sum() == 8
    assert reward.provides == {"reward.grad"}


def test_a_wrong_shape_is_explained(source):
    with pytest.raises(ValueError, match=r"wrong returned shape \(1,\) for 2 samples"):
        file_reward(f"{source}:wrong")(ACGT)


def test_a_file_that_changed_is_refused(source):
    digest, text = inspect_reward(f"{source}:text")
    assert text is True and file_reward(f"{source}:text", digest)
    source.write_text(source.read_text() + "\n")
    with pytest.raises(DavBenchError, match="changed since this run was planned"):
        file_reward(f"{source}:text", digest)


def test_a_run_builds_its_parts(source):
    options = {"tasks": ["toy-tokens"], "reward": f"{source}:soft", "baselines": False, "search": None}
    (run,) = planned(methods=["dav"], sets=["dav.width=7", "dav.guide=true"], **options)
    method = build_method(run.spec)
    assert method.search.width == 7 and method.loss is not None
    assert build_reward(run.spec, "train")(ACGT).tolist() == [1.0, 4.0]


def test_a_pair_builds_both_parts():
    sets = ["searcher.n=3", "trainer.kl=0.5", "training.rounds=2"]
    (run,) = planned(
        methods=[],
        tasks=["toy-tokens"],
        pair=("best-of", "forward-kl"),
        sets=sets,
        baselines=False,
        search=None,
    )
    method = build_method(run.spec)
    assert (method.search.n, method.loss.kl, method.training.rounds) == (3, 0.5, 2)


@pytest.mark.parametrize("name", ["dav", "dav-kl", "svdd", "best-of-n", "pretrained", "real"])
def test_what_a_registration_requires_covers_what_is_built(name):
    """The static requirements, which plans match without torch, against those of the built parts."""
    from dav_bench.plugins import catalog
    from dav_bench.registry import active

    for sets in ([], ["guide=false"], ["guide=true"], ["anchor=ref"], ["kl=0.5"]):
        entry = catalog().get("methods", name)
        fields = dict(s.split("=") for s in sets)
        if entry.config is None or not set(fields) <= set(entry.config.__dataclass_fields__):
            continue
        config = entry.settings(fields)
        built = entry.load()(config).requires
        assert built <= active(entry.requires, vars(config)) | {"step.kl", "reference"}, sets
