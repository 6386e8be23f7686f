"""Running expectations: each method is built, trained and sampled as in a run, and compared with its law."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from dav_bench.errors import DavBenchError
from dav_bench.seeds import stream
from dav_bench.verify.expectations import Expectation

if TYPE_CHECKING:
    from dav_bench.core import Batch, Model
    from dav_bench.spec import RunSpec

MICRO_BATCH = 8192
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One expectation and what came of it."""

    row: Expectation
    """What was expected."""
    distance: float
    """How far the samples are from the law."""
    low: float
    """Lower end of the 99 % interval of exact samples."""
    high: float
    """Upper end."""
    start: float
    """Distance of the pretrained model from the law; NaN for an estimate of Z."""
    away: float
    """Distance of the law from the target; NaN where the expectation is none of a law."""
    reward: float
    """Mean reward of the samples."""
    seconds: float
    """Of one CPU thread, to train and to sample."""
    error: str = ""
    """Why there is no distance."""

    @property
    def limit(self) -> float:
        """Largest distance that is as expected; allowances are shares of the way there."""
        return self.high + self.row.allowance * (self.start if self.start > 1 else 1.0)

    @property
    def passed(self) -> bool:
        """Whether the expectation held; below the interval is no fault, samples may be more even than chance."""
        return not self.error and self.distance <= self.limit

    def __str__(self) -> str:
        if self.error:
            return f"{self.row.method} on {self.row.world}: {self.error}"
        verdict = "as expected" if self.passed else "NOT as expected"
        return (
            f"{self.row.method} on {self.row.world} {self.row.says}: distance {self.distance:.4f}, "
            f"at most {self.limit:.4f}: {verdict}"
        )


def verify(
    rows: Iterable[Expectation], seed: int = 0, jobs: int = 1, say: Callable[[Result], None] | None = None,
    device: str = "cpu",
) -> list[Result]:  # fmt: skip
    """Run expectations and compare.

    Args:
        rows: What to run, such as `expectations()` or a plugin's own.
        seed: Of training and sampling; every seed should pass, up to the level of the intervals.
        jobs: Processes, one CPU thread each.
        say: Told of each result as it comes.
        device: Where methods train and sample; laws and distances are computed on the CPU.
    """
    todo = list(rows)
    say = say or (lambda result: None)
    results = []
    for result in spread(partial(check, device=device), todo, seed, jobs):
        say(result)
        results.append(result)
    return results


def spread(work: Callable[[Any, int], T], items: Sequence[Any], seed: int, jobs: int) -> Iterator[T]:
    """work(item, seed) of each item in order, in as many processes."""
    if jobs == 1 or len(items) < 2:
        for item in items:
            yield work(item, seed)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:  # torch's threads do not survive a fork
        yield from pool.map(work, items, [seed] * len(items))


def check(
    row: Expectation, seed: int = 0, around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: str = "cpu",
) -> Result:  # fmt: skip
    """Run one expectation; `around` makes a context that holds while the method is built, trained and sampled."""
    import torch

    from dav_bench.verify.laws import away_of, measure, start_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        with around():
            model, batch = sample(row, seed, device)
        seconds = time.process_time() - began
        found = measure(row, model, batch)
        reward = float(batch.reward.double().mean())
        start, away = start_of(row), away_of(row)
        return Result(row, found.distance, found.low, found.high, start, away, reward, seconds)
    except (DavBenchError, ValueError, RuntimeError) as err:
        nan = float("nan")
        return Result(row, nan, nan, nan, nan, nan, nan, 0.0, " ".join(str(err).split()))
    finally:
        torch.set_num_threads(threads)


def spec_of(row: Expectation, seed: int = 0) -> RunSpec:
    """The specification of a run with these settings; what cannot run in that world is an error with the way out."""
    from dav_bench.config import Layer
    from dav_bench.plan import Request, plan
    from dav_bench.plugins import catalog
    from dav_bench.tasks import find_task

    sections = {row.method: dict(row.settings), "sampler": dict(row.sampler), "model": dict(row.model)}
    layer = Layer("verify", {name: values for name, values in sections.items() if values}, strict=True)
    request = Request([row.method], [find_task(row.world)], (seed,), [layer], search=None, baselines=False)
    (run,) = plan(request, catalog(), fresh=True)
    if run.status == "skip":
        raise DavBenchError(f"{row.method!r} cannot run on {row.world!r}.", run.reason, run.fix)
    return run.spec


def sample(row: Expectation, seed: int = 0, device: str = "cpu") -> tuple[Model, Batch]:
    """The model after training, where the method trains, and `row.n` samples drawn as a run would draw them.

    Both work on `device`; the samples come back to the CPU.
    """
    import torch

    from dav_bench import build
    from dav_bench.core import Context, Meter, MeteredReward, Noise, Rollout

    spec = spec_of(row, seed)
    method, model = build.build_method(spec), build.build_model(spec)
    model.to(device, torch.float32).network.eval()
    reward, meter = build.build_reward(spec, "train"), Meter()
    if isinstance(reward, torch.nn.Module):
        reward = reward.to(device).eval().requires_grad_(False)
    model.attach(meter, MICRO_BATCH)
    ctx = Context(model, model.reference(), MeteredReward(reward, meter, MICRO_BATCH), meter)
    if method.loss is not None:
        ctx.modules = method.loss.modules(ctx)
        _train(ctx, method, seed, device)
    searcher = method.sampler or (method.search if method.loss is None else Rollout(keep=False))
    batch = searcher(ctx, Noise.of(stream(seed, "verify"), row.n, device=device))
    log_z = None if batch.log_z is None else batch.log_z.cpu()
    return model, replace(batch, states=batch.states.cpu(), reward=batch.reward.cpu(), log_z=log_z)


def _train(ctx: Any, method: Any, seed: int, device: str) -> None:
    """The rounds of a run, without its files."""
    from dav_bench.core import Noise, fit
    from dav_bench.core.fit import optimizer, parameters

    plan = method.training
    opt = optimizer(parameters(ctx), plan, ctx.modules)
    for r in range(1, plan.rounds + 1):
        batch = method.search(ctx, Noise.of(stream(seed, "search", r), plan.samples, device=device))
        noise = Noise.of(stream(seed, "fit", r), 1, device=device)
        fit(method.loss, ctx, batch, opt, plan, noise, ((r - 1) / plan.rounds, r / plan.rounds))
