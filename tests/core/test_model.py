"""Models: grouping of equal states, references, rewards and chunks."""

import pytest
import torch
from worlds import disturb, model

from dav_bench.core import Meter, MeteredReward, Noise, NonFinite
from dav_bench.core.model import chunks, distinct


@pytest.mark.parametrize("high", [2, 5, 1000])
def test_distinct_groups_equal_rows_in_order_of_appearance(high):
    ids = torch.randint(high, (300, 4), generator=torch.Generator().manual_seed(high))
    first, group = distinct(ids)
    assert torch.equal(ids[first][group], ids)
    assert len(first) == len(ids.unique(dim=0))
    assert torch.equal(first, first.sort().values)
    assert all(int((ids == ids[k]).all(1).nonzero()[0, 0]) == int(first[group[k]]) for k in range(300))


def test_sequences_that_differ_in_a_few_tokens_are_told_apart_by_their_hashes():
    """A collision among them would end all sharing for the batch, silently."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (1, 200), generator=generator).repeat(5000, 1)
    place = torch.randint(200, (5000, 2), generator=generator)
    ids.scatter_(1, place, torch.randint(5, (5000, 2), generator=generator))
    assert len(distinct(ids)[0]) == len(ids.unique(dim=0))


def test_rows_whose_hashes_collide_are_never_merged(monkeypatch):
    ids = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 1]])
    plain = torch.arange
    monkeypatch.setattr(
        torch, "arange", lambda *a, **k: plain(*a, **k) * 0 if k.get("dtype") else plain(*a, **k)
    )
    first, group = distinct(ids)
    assert torch.equal(ids[first][group], ids)


def test_chunks_cover_all_rows_once():
    assert [(c.start, c.stop) for c in chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(c.start, c.stop) for c in chunks(7, None)] == [(0, 7)]
    assert list(chunks(0, None)) == []


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_predictions_do_not_depend_on_the_micro_batch(kind):
    world = model(kind, untrained=False)
    x = world.process.step(world.predict(world.process.prior(Noise.of(0, 9), torch.float64), 8),
                           world.process.prior(Noise.of(0, 9), torch.float64), 8).sample(Noise.of(1, 9))  # fmt: skip
    whole = world.predict(x, 7)
    world.attach(Meter(), micro_batch=2)
    assert torch.allclose(world.predict(x, 7), whole, atol=1e-14)
    assert world.meter.total("forward") == 9
    with pytest.raises(ValueError, match="row"):
        world.predict(x[:0], 7)


def test_reference_stays_pretrained_and_has_no_parameters_to_train():
    world = model("parallel")
    x = world.process.prior(Noise.of(0, 2), torch.float64)
    before = world.predict(x, 8)
    disturb(world)
    assert not torch.allclose(world.predict(x, 8), before)
    assert torch.equal(world.reference().predict(x, 8), before)
    assert world.reference().reference() is world.reference()
    assert not world.reference().trainable()
    assert world.reference().meter is world.meter


def test_states_come_back_from_storage_in_the_dtype_of_the_network():
    world = model("parallel")
    x = world.process.prior(Noise.of(0, 2), torch.float64)
    assert torch.equal(world.unpack(world.process.pack(x)), x)
    assert world.unpack(world.process.pack(x)).dtype == torch.float64


def test_only_networks_without_time_share_states():
    assert model("parallel").shares
    assert not model("mixture").shares
    timed = model("parallel")
    timed.network.time_input = True
    assert not timed.shares


def test_an_ode_sampler_has_no_density():
    world = model("mixture")
    assert "step.log_prob" in world.provides
    world.process.eta = 0.0
    assert "step.log_prob" not in world.provides
    assert "sample" in world.provides


def test_reward_rows_are_counted_chunked_and_checked():
    seen = []

    def total(sample, cond=None):
        seen.append(len(sample))
        return sample.sum(1)

    meter = Meter()
    reward = MeteredReward(total, meter, micro_batch=4)
    x = torch.arange(20.0).view(10, 2)
    assert torch.equal(reward(x), x.sum(1))
    assert seen == [4, 4, 2]
    assert meter.total("reward") == 10
    assert reward(x.double()).dtype == torch.float64
    assert reward(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="shape"):
        MeteredReward(lambda s, c: s, meter)(x)
    with pytest.raises(NonFinite, match="2 of 10"):
        MeteredReward(lambda s, c: torch.where(s[:, 0] > 15, float("nan"), s[:, 0]), meter)(x)
