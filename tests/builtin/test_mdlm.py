"""The generator of the task `dna`: shapes, relaxed states, the shipped weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dav_bench.builtin.models.mdlm import DEFAULT, ConvDenoiser, build, network, real
from dav_bench.builtin.weights import find, load
from dav_bench.errors import DavBenchError

UNIFORM_BITS = 2.0


def corrupted(x0: torch.Tensor, share: float) -> torch.Tensor:
    """Real sequences (n, 200, 4) with that share of bases masked, (n, 200, 5)."""
    hide = torch.rand(x0.shape[:2], generator=torch.Generator().manual_seed(1)) < share
    return torch.where(hide[..., None], F.one_hot(torch.tensor(4), 5).float(), F.pad(x0, (0, 1)))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_logits_have_one_row_per_base(patch: int) -> None:
    net = ConvDenoiser(width=8, kernel=3, dilations=(1, 2), patch=patch)
    x = F.one_hot(torch.randint(0, 5, (3, 40)), 5).float()
    assert net(x, torch.zeros(3)).shape == (3, 40, 4)
    assert not net.time_input


def test_a_patch_predicts_its_own_positions() -> None:
    """Without neighbours (kernel 1) and without the mean over positions, only a patch's own bases matter."""
    torch.manual_seed(0)
    net = ConvDenoiser(width=8, kernel=1, dilations=(1,), patch=4)
    net.blocks = torch.nn.Sequential()
    net.norm = torch.nn.Identity()
    x = F.one_hot(torch.randint(0, 4, (1, 40)), 5).float()
    other = x.clone()
    other[:, 9] = F.one_hot(torch.tensor(4), 5).float()
    changed = (net(x) - net(other)).abs().sum(-1)[0] > 0
    assert changed[8:12].all()
    assert not changed[:8].any() and not changed[12:].any()


def test_relaxed_states_carry_gradients() -> None:
    net, _ = network(DEFAULT)
    x = torch.full((2, 200, 5), 0.2, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.ones(2)).logsumexp(-1).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((0, 1)) > 0).all()


def test_the_whole_sequence_matters() -> None:
    """The first base's prediction moves when the last base does."""
    net, _ = network(DEFAULT)
    x = corrupted(real("validation")[:1], 0.5)
    other = x.clone()
    other[0, -1] = x[0, -1].roll(1)
    assert not torch.equal(net(x)[0, 0], net(other)[0, 0])


def test_shipped_generator_beats_uniform_and_uses_context() -> None:
    net, meta = network(DEFAULT)
    x0 = real("validation")[:256]
    bits = {}
    for share in (0.1, 0.9):
        x = corrupted(x0, share)
        with torch.no_grad():
            nll = -(net(x).log_softmax(-1) * x0).sum(-1)[x[..., -1] == 1]
        bits[share] = nll.mean().item() / 0.6931471805599453
    assert bits[0.1] < bits[0.9] < UNIFORM_BITS
    assert bits[0.1] < 1.90
    assert meta["seconds"] > 0


def test_model_is_a_masked_process_with_real_samples() -> None:
    model = build(None, {"steps": 8})
    assert (model.process.T, model.domain, model.shares) == (8, "sequence", True)
    x = corrupted(real("validation")[:2], 0.5)
    step = model.step(x, 4)
    kept = x[..., -1] == 0
    assert torch.equal(step.x0[kept], x[..., :4][kept])
    assert model.data is not None
    assert model.data("test").shape[1:] == (200, 4)


def test_splits_do_not_overlap() -> None:
    def found(split: str) -> set[bytes]:
        return {row.tobytes() for row in real(split).argmax(-1).to(torch.uint8).numpy()}

    rows = {split: found(split) for split in ("train", "test", "validation")}
    assert rows["train"].isdisjoint(rows["test"]) and rows["train"].isdisjoint(rows["validation"])
    assert sum(map(len, rows.values())) == 11_968


def test_weights_are_half_precision_and_small() -> None:
    folder = find(DEFAULT).parent
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 10 * 2**20
    state, _ = load(DEFAULT)
    assert {v.dtype for v in state.values()} == {torch.float32}


def test_unknown_weights_are_named() -> None:
    with pytest.raises(DavBenchError, match="no-such"):
        find("no-such")
