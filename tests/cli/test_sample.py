"""More samples of a finished run, and the files they are written to."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from dav_bench.build import search_settings
from dav_bench.cli.run import planned
from dav_bench.cli.sample import sample
from dav_bench.errors import DavBenchError
from dav_bench.runner import Options, draw, execute
from dav_bench.store import RunDir

SETTINGS = ["dav.alpha=1", "dav.guide=false", "dav.rounds=2", "dav.samples=16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("results")
    runs = planned(methods=["dav"], tasks=["toy-tokens"], sets=SETTINGS, out=out)
    spec = next(r.spec for r in runs if r.spec.label == "dav")
    return execute(spec, Options(out=out, threads=1))


def more(run: RunDir, n: int, **options: object) -> tuple[torch.Tensor, list[float]]:
    found, reward = draw(run, n, Options(out=run.path.parents[3]), say=lambda line: None, **options)  # type: ignore[arg-type]
    return found.x, list(reward)


def test_chunks_and_number_do_not_change_the_samples(run: RunDir) -> None:
    x, reward = more(run, 40)
    again, _ = more(run, 40, chunk=7)
    fewer, first = more(run, 12)
    assert torch.equal(x, again)
    assert torch.equal(x[:12], fewer)
    assert reward[:12] == first


def test_the_seed_changes_them(run: RunDir) -> None:
    assert not torch.equal(more(run, 40)[0], more(run, 40, seed=1)[0])


def test_search_at_sampling_time_raises_the_reward(run: RunDir) -> None:
    spec = run.spec
    searched = more(run, 200, search=search_settings("tree", spec["params"]))[1]
    assert sum(searched) / 200 > sum(more(run, 200)[1]) / 200 + 0.2


def test_search_settings_are_those_of_the_method(run: RunDir) -> None:
    assert search_settings("tree", run.spec["params"])["params"]["alpha"] == 1.0


@pytest.mark.parametrize("name", ["designs.fasta", "designs.csv", "designs.parquet"])
def test_each_form_holds_every_sample_best_first(run: RunDir, tmp_path: Path, name: str) -> None:
    path, out = tmp_path / name, run.path.parents[3]
    sample(str(run.path), n=9, search="", seed=0, out=path, results=out, device="cpu")
    if name.endswith("fasta"):
        lines = path.read_text().splitlines()
        sequences, reward = lines[1::2], [float(line.split("reward=")[1].split()[0]) for line in lines[0::2]]
    else:
        frame = pl.read_csv(path) if name.endswith("csv") else pl.read_parquet(path)
        sequences, reward = frame["sequence"].to_list(), frame["reward"].to_list()
    assert len(sequences) == 9
    assert all(set(s) <= set("ACGT") and len(s) == 3 for s in sequences)
    assert reward == sorted(reward, reverse=True)


def test_an_unknown_form_and_a_missing_folder_are_told_before_anything_is_drawn(
    run: RunDir, tmp_path: Path
) -> None:
    for path, words in (
        (tmp_path / "designs.docx", "no form"),
        (tmp_path / "none" / "d.csv", "does not exist"),
    ):
        with pytest.raises(DavBenchError, match=words):
            sample(str(run.path), n=2, search="", seed=0, out=path, results=run.path.parents[3], device="cpu")


def test_a_run_that_is_not_finished_is_refused(run: RunDir, tmp_path: Path) -> None:
    other = planned(methods=["dav"], tasks=["toy-tokens"], sets=[*SETTINGS, "dav.lr=0.1"], out=tmp_path)
    with RunDir.create(tmp_path, other[-1].spec) as begun, pytest.raises(DavBenchError, match="not finished"):
        draw(begun, 2, Options(out=tmp_path))
