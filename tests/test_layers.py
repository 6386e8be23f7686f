import pytest

from dav_bench.errors import DavBenchError
from dav_bench.layers import config_layer, env_layer, from_table, set_layers
from dav_bench.plugins import catalog


def test_tables_of_a_method_are_sections():
    layer = from_table(
        "file",
        {
            "method": {"width": 3, "dav": {"width": 5}},
            "svdd": {"width": 7},
            "reward": {"train": "gc", "heldout": {"weights": "x"}},
            "sampler": {"steps": 8},
        },
    )
    assert layer.sections == {
        "method": {"width": 3},
        "dav": {"width": 5},
        "svdd": {"width": 7},
        "reward.train": {"use": "gc"},
        "reward.heldout": {"weights": "x"},
        "sampler": {"steps": 8},
    }


def test_a_value_outside_a_table_is_refused():
    with pytest.raises(DavBenchError, match="expected a table"):
        from_table("f.toml", {"width": 3})


def test_the_environment_names_sections_with_underscores():
    layer = env_layer(catalog(), {"DAV_BENCH_SET_DAV_KL__WIDTH": "8", "DAV_BENCH_SET_REWARD__TRAIN": "gc", "X": "1"})
    assert layer.sections == {"dav-kl": {"width": "8"}, "reward.train": {"use": "gc"}}


def test_a_misspelt_variable_is_an_error():
    with pytest.raises(DavBenchError, match="SECTION__KEY"):
        env_layer(catalog(), {"DAV_BENCH_SET_SAMPLR__STEPS": "8"})


def test_config_file_errors_name_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("[dav\n")
    with pytest.raises(DavBenchError, match=r"c\.toml cannot be read"):
        config_layer(tmp_path / "c.toml")
    with pytest.raises(DavBenchError, match="cannot be read"):
        config_layer(tmp_path / "none.toml")


def test_lists_of_scalars_span_a_grid_and_lists_of_lists_do_not():
    points = set_layers(["dav.width=4,8", "sampler.steps=16,32", "dav.betas=0.9,0.99"], catalog())
    assert [(p.sections["dav"]["width"], p.sections["sampler"]["steps"]) for p in points] == [
        ("4", "16"),
        ("4", "32"),
        ("8", "16"),
        ("8", "32"),
    ]
    assert {p.sections["dav"]["betas"] for p in points} == {"0.9,0.99"}
    assert len(set_layers([], catalog())) == 1


@pytest.mark.parametrize("item", ["dav.width", "width=3", "=3", "dav.=3", ".width=3"])
def test_malformed_settings_say_how_to_write_them(item):
    with pytest.raises(DavBenchError, match=r"section\.key=value"):
        set_layers([item], catalog())
