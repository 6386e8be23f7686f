"""Rewards on images that need no weights, against direct computations."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dav_bench.builtin.rewards.colour import Colourfulness
from dav_bench.builtin.rewards.jpeg import Compressibility, Incompressibility
from dav_bench.cli.plugins import describe
from dav_bench.plugins import catalog


def images(n: int = 4, size: int = 32) -> Tensor:
    """From plain to busy."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(n, 3, size, size, generator=generator)
    strength = torch.linspace(0, 1, n).view(-1, 1, 1, 1)
    return torch.tensor([0.8, 0.4, 0.2]).view(3, 1, 1) * (1 - strength) + strength * noise


def saved(image: Tensor) -> float:
    file = io.BytesIO()
    array = np.rint(image.double().numpy() * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(array).save(file, format="JPEG", quality=95)
    return len(file.getvalue()) / 1000


def test_jpeg_is_the_size_of_the_file() -> None:
    x = images()
    expected = [saved(image) for image in x]
    assert Incompressibility()(x).tolist() == pytest.approx(expected)
    assert Compressibility()(x).tolist() == pytest.approx([-e for e in expected])
    assert expected == sorted(expected)


def test_jpeg_does_not_hide_a_pixel_that_is_not_a_number() -> None:
    x = images(3)
    x[1, 0, 0, 0] = torch.nan
    assert Incompressibility()(x).isnan().tolist() == [False, True, False]


def colourfulness(image: np.ndarray) -> float:
    """Of (H, W, 3) in 0 ... 255, as Hasler and Süsstrunk write it."""
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    rg, yb = r - g, 0.5 * (r + g) - b
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def test_colourfulness_is_the_formula() -> None:
    x = images(6).double()
    expected = [colourfulness(255 * image.permute(1, 2, 0).numpy()) for image in x]
    assert Colourfulness()(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert Colourfulness()(x.float()).tolist() == pytest.approx(expected, rel=1e-5)


def test_colourfulness_has_a_gradient_that_is_finite_on_grey() -> None:
    x = images(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(Colourfulness(), x[1:].detach().requires_grad_())
    grey = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    value = Colourfulness()(grey)
    (gradient,) = torch.autograd.grad(value.sum(), grey)
    assert value.item() == 0
    assert gradient.abs().max() == 0


def test_the_stated_range_of_colourfulness_is_reached() -> None:
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]])  # red, green, magenta, cyan
    shares = torch.tensor([661, 339, 661, 339])  # the mean lies 0.3 / sqrt(1.09) of the way out
    x = corners.repeat_interleave(shares, 0).T[None, :, None]
    low, high = Colourfulness.range
    assert low == 0
    assert Colourfulness()(x).item() == pytest.approx(high, abs=0.1)
    assert Colourfulness()(images(32)).max() < high


@pytest.mark.parametrize("name", ["jpeg-compressibility", "jpeg-incompressibility", "colourfulness"])
def test_declares_what_it_is(name: str) -> None:
    entry = catalog().get("rewards", name)
    reward = entry.build()
    assert (entry.domain, reward.domain) == ("image", "image")
    assert frozenset(entry.provides) == reward.provides
    low, high = reward.range
    values = reward(images())
    assert values.shape == (4,)
    assert (values >= low).all()
    assert (values <= high).all()
    assert reward.unit


@pytest.mark.parametrize(
    ("name", "range"), [("colourfulness", "0 to 297.7"), ("emoji-clip", "-100 to 100"), ("aesthetic", "-inf to inf")]
)
def test_show_states_range_and_unit(name: str, range: str) -> None:
    shown = describe(catalog().get("rewards", name), None, None, None, [])
    assert shown["range"] == range
    assert shown["unit"]
