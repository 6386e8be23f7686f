"""The generator of the task `dna`: shapes, relaxed states, the shipped weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dav_bench.builtin.models.mdlm import DEFAULT, Hourglass, Memory, build, network, real
from dav_bench.builtin.weights import find, load
from dav_bench.errors import DavBenchError

UNIFORM_BITS = 2.0


def corrupted(x0: torch.Tensor, share: float) -> torch.Tensor:
    """Real sequences (n, 200, 4) with that share of bases masked, (n, 200, 5)."""
    hide = torch.rand(x0.shape[:2], generator=torch.Generator().manual_seed(1)) < share
    return torch.where(hide[..., None], F.one_hot(torch.tensor(4), 5).float(), F.pad(x0, (0, 1)))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_logits_have_one_row_per_base(patch: int) -> None:
    net = Hourglass(width=8, kernel=3, dilations=(1, 2), patch=patch)
    x = F.one_hot(torch.randint(0, 5, (3, 40)), 5).float()
    assert net(x, torch.zeros(3)).shape == (3, 40, 4)
    assert not net.time_input


def test_memory_adds_the_votes_of_every_window() -> None:
    """Against loops over windows and their bases."""
    torch.manual_seed(0)
    memory, span, stride = Memory(words=6, span=8, stride=2), 8, 2
    x = torch.rand(2, 20, 5)
    expected, padded = torch.zeros(2, 20, 4), F.pad(x, (0, 0, 3, 3))
    for start in range(0, 20, stride):
        window = padded[:, start : start + span].transpose(1, 2).flatten(1)
        votes = memory.write(F.relu6(memory.read(window)) / 6).view(2, span, 4)
        for i in range(span):
            if 0 <= start - 3 + i < 20:
                expected[:, start - 3 + i] += votes[:, i]
    assert torch.allclose(memory(x), expected, atol=1e-5)


def test_memory_completes_a_word_seen_in_part() -> None:
    """A word half hidden is recalled in its place; a sequence without it gets no votes."""
    g = torch.Generator().manual_seed(0)
    word, memory = torch.randint(0, 4, (24,), generator=g), Memory(words=1, span=24, stride=4)
    memory.remember(50 * F.one_hot(word, 4)[None].float())
    other = torch.randint(0, 4, (2, 40), generator=g)
    other[0, 10:34] = word  # windows start at -10, -6, ..., 10
    hidden = other.clone()
    hidden[0, 10:34:2] = 4
    votes = memory(F.one_hot(hidden, 5).float())
    assert torch.equal(votes[0, 10:34].argmax(-1), word)
    assert not votes[0, :10].any() and not votes[0, 34:].any() and not votes[1].any()


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
    assert bits[0.1] < 1.86
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


def test_shipped_generator_knows_repeats() -> None:
    """Bases of the repeat LTR7, at home in hESC elements, cost half of what other bases do."""
    word = torch.tensor(["ACGT".index(base) for base in "CAGTCTGAGATCAAACTGCA"])
    net, _ = network(DEFAULT)
    x0 = real("validation", "hESCT0")
    x0 = x0[(x0.argmax(-1).unfold(1, len(word), 1) == word).all(-1).any(1)]
    x = corrupted(x0, 0.3)
    with torch.no_grad():
        nll = -(net(x).log_softmax(-1) * x0).sum(-1)[x[..., -1] == 1]
    assert nll.mean().item() / 0.6931471805599453 < 1.2


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
