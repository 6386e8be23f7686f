import pytest

from dav_bench.seeds import stream


def test_a_stream_is_the_same_for_ever():
    assert stream(20000, "eval") == 4408262754020589056
    assert stream(0, "search", 3) == 8736830406328890794


@pytest.mark.parametrize("other", [(1, "eval", 2), (0, "fit", 2), (0, "eval", 3), (0, "eval"), (0, "eval", "2")])
def test_every_part_matters(other):
    assert stream(*other) != stream(0, "eval", 2)


def test_seeds_fit_a_signed_64_bit_integer():
    seeds = [stream(i, "x") for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62  # the whole range is used
