"""The fixed points that methods are held to, against each other and against the exact worlds."""

import pytest
import torch

from dav_bench.builtin.exact import Law, world_of
from dav_bench.core import PosteriorMean
from dav_bench.verify.chains import Line, Tokens


@pytest.fixture(scope="module")
def tokens():
    world = world_of("toy-tokens", alpha=1.0)
    return world, Tokens.of_model(world.model, world.reward)


@pytest.fixture(scope="module")
def line():
    world = world_of("toy-mixture", {"steps": 12}, alpha=1.0)
    return world, Line.of_model(world.model, world.reward)


def tv(p, q):
    return float((p - q).abs().sum() / 2)


def test_the_reference_has_the_law_of_the_world(tokens, line):
    world, chain = tokens
    assert tv(chain.of(chain.reference), world.prior.p) < 1e-12
    world, chain = line
    assert abs(world.apart(Law(chain.states[0], chain.of(chain.reference)), world.prior)) < 1e-3


def test_soft_steps_compose_to_the_target(tokens, line):
    world, chain = tokens
    for alpha in (1.0, 0.3):
        law = chain.law(chain.soft(alpha))
        assert tv(law, world_of("toy-tokens", alpha=alpha).target().p) < 1e-12
    world, chain = line
    assert abs(world.apart(Law(chain.states[0], chain.law(chain.soft(1.0))), world.target())) < 1e-3


def test_tokens_can_be_anything_so_k_fits_are_k_tilts_and_control_is_the_target(tokens):
    world, chain = tokens
    for k in (1, 2, 3):
        assert tv(chain.of(chain.tilts(k, 1.0)), world.target(k).p) < 1e-12
    assert tv(chain.of(chain.control(1.0)), world.target().p) < 1e-12


def test_means_of_steps_cannot_make_every_target(line):
    world, chain = line
    for policy in (chain.control(1.0), chain.tilts(1, 1.0)):
        off = world.apart(Law(chain.states[0], chain.of(policy)), world.target())
        assert 1e-3 < off < 0.05


@pytest.mark.parametrize("look", ["mean", "mode"])
def test_a_perfect_fit_of_one_round_keeps_the_letters_of_the_search(tokens, look):
    """The search also prefers positions, which no fit can follow: near the steered chain and not equal to it."""
    world, chain = tokens
    steered = world.steered(PosteriorMean(look)).p
    fitted = chain.of(chain.rounds(1, 1.0, look))
    assert 0 < tv(fitted, steered) < 0.02
    assert tv(fitted, chain.of(chain.fitted(1.0, look))) < 1e-12


def test_laws_that_methods_differ_in_are_far_enough_apart_to_be_told(tokens):
    world, chain = tokens
    laws = {
        "target": world.target(),
        "mean": world.steered(PosteriorMean("mean")),
        "mode": world.steered(PosteriorMean("mode")),
        "pulled": Law(world.prior.x, chain.of(chain.pulled(1.0))),
    }
    names = list(laws)
    near = {(a, b): world.apart(laws[a], laws[b]) for a in names for b in names if a < b}
    assert min(near.values()) > 0.014, near
    own = Law(world.prior.x, chain.of(chain.fitted(1.0, "mean", "policy")))
    assert world.apart(own, laws["mean"]) > 0.06
    # the reward is nearly linear in each position, so its expectation and that of the mean are nearly one
    assert world.apart(Law(world.prior.x, chain.expected(1.0)), laws["mean"]) < 1e-4


def test_guided_steps_are_those_of_the_gradient_at_no_scale_the_reference(tokens, line):
    world, chain = tokens
    assert tv(chain.guided(0.0), world.prior.p) < 1e-12
    assert tv(chain.guided(0.0, letters=True), world.prior.p) < 1e-12
    assert 0.001 < tv(chain.guided(1.0), chain.guided(1.0, letters=True)) < 0.05
    world, chain = line
    assert tv(chain.guided(0.0), chain.of(chain.reference)) < 1e-9


def test_a_pull_of_the_fit_is_stationary(tokens):
    """argmin of E_q[−log p] + λ KL(p || ref) over letters, by its gradient."""
    _, chain = tokens
    i, pull = 2, 0.7
    lean = torch.randn(chain.child[i].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_q = (chain.kernel(i, chain.reference[i]) + lean).log_softmax(1)
    best = chain.project(i, log_q, pull)

    def loss(letters):
        p, ref, q = letters.log_softmax(-1), chain.reference[i], log_q.view_as(letters).exp()
        return (-(q * p) + pull / i * p.exp() * (p - ref)).sum()

    free = best.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(free), free)
    assert g.abs().max() < 1e-5
    assert loss(best) < min(loss(chain.project(i, log_q)), loss(chain.reference[i]))


def test_more_rounds_go_farther_and_a_pull_holds_them_back(tokens):
    _, chain = tokens
    mean = [float((chain.of(chain.rounds(k, 1.0)) * chain.r).sum()) for k in (1, 2, 4)]
    held = [float((chain.of(chain.rounds(k, 1.0, pull=1.0)) * chain.r).sum()) for k in (1, 2, 4)]
    assert mean == sorted(mean) and mean[-1] > 3.3
    assert all(h < m for h, m in zip(held, mean, strict=True)) and held[-1] < 2.0
