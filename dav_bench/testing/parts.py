"""Rewards, models, metrics, tasks and trackers, each on its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dav_bench import tasks as task_files
from dav_bench.config import settings_of
from dav_bench.core import Context, Meter, Model, Noise, Rollout
from dav_bench.errors import DavBenchError, near
from dav_bench.plugins import catalog, plugins, reason_of
from dav_bench.registry import Entry, active
from dav_bench.tasks import DERIVED, ROLES, all_tasks, find_task

from .checklist import Checklist, Fail, Skip, label_of
from .runs import TOYS, execute_anew, planned_small, sandbox
from .writes import Writes

LIFE = ("run_started", "round_finished", "samples_ready", "run_finished")
"""Hooks that a tracker may have."""

_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "vector": ((6, 1), (6, 2)),
    "sequence": ((6, 3, 4), (6, 8, 4), (4, 200, 4)),
    "image": ((2, 3, 64, 64), (2, 3, 256, 256)),
}
"""Samples that are tried, by domain."""


# ---- rewards


def reward(
    checklist: Checklist,
    entry: Entry,
    samples: Tensor | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    made: list[Any] = []
    with checklist.item(label_of(entry, "it can be built")):
        reward = entry.build(settings or {})
        if isinstance(reward, torch.nn.Module):
            reward = reward.eval().requires_grad_(False)
        made.append(reward)
    if not made:
        return
    reward = made[0]
    with checklist.item(
        label_of(entry, "it gives what it is registered with"), "make provides= and domain= agree"
    ):
        gives = active(entry.provides, {**defaults_of(entry), **(settings or {})})
        own = set(getattr(reward, "provides", gives))
        hidden = sorted((gives - own) & {"reward.grad", "reward.features"})
        if hidden:
            raise Fail(f"registered with {', '.join(hidden)}, which the object does not provide")
        domain = getattr(reward, "domain", entry.domain)
        if entry.domain is not None and domain != entry.domain:
            raise Fail(f"registered for {entry.domain}, the object says {domain}")
    name = label_of(entry, "samples give one finite value each")
    x = samples
    if x is None:
        tried: list[Exception] = []
        for x in _samples(entry.domain):
            try:
                reward(x)
                break
            except DavBenchError as err:
                checklist.skip(name, reason_of(err))
                return
            except Exception as err:
                tried.append(err)
        else:
            why = (
                f"none of the usual shapes will do ({reason_of(tried[0])})" if tried else "no domain is given"
            )
            checklist.skip(name, f"{why}; check_reward({entry.name!r}, samples) takes yours")
            return
    with torch.no_grad(), checklist.item(name, "return a tensor (B,), higher is better"):
        held = x.clone()
        value = reward(x)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            raise Fail(
                f"{len(x)} samples gave {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
            )
        if not value.isfinite().all():
            raise Fail(f"{int((~value.isfinite()).sum())} of {len(x)} values are not finite")
        if not torch.equal(x, held):
            raise Fail("the samples were changed in place", "work on a copy")
    with (
        torch.no_grad(),
        checklist.item(
            label_of(entry, "a value depends on its own sample alone"),
            "no batch statistics, no global noise",
        ),
    ):
        torch.manual_seed(1)
        value = reward(x)
        torch.manual_seed(2)
        alone = torch.cat([reward(x[k : k + 1]) for k in range(len(x))])
        if not torch.allclose(value, alone, rtol=1e-3, atol=1e-4):
            raise Fail(f"alone, a sample's value moves by {float((value - alone).abs().max()):.2g}")
    if "reward.features" in gives:
        with torch.no_grad(), checklist.item(label_of(entry, "head(features(x)) is the reward")):
            split = reward.head(reward.features(x), None)
            if not torch.allclose(split, reward(x), rtol=1e-3, atol=1e-4):
                raise Fail(f"they differ by {float((split - reward(x)).abs().max()):.2g}")
    if "reward.grad" in gives:
        _gradient(checklist, entry, reward, x)


def _gradient(checklist: Checklist, entry: Entry, reward: Any, x: Tensor) -> None:
    fix = "differentiate through the sample, between the corners as well, or leave out provides='reward.grad'"
    with checklist.item(label_of(entry, "its gradient is the slope of its value"), fix) as item:
        if isinstance(reward, torch.nn.Module):
            reward = reward.double()
        try:
            x = _inside(entry.domain, x.double())
            step = _direction(entry.domain, x)
            reward(x)
        except Exception:  # it computes in float32 alone
            x, step = x.float(), step.float()
        size = 1e-5 if x.dtype == torch.float64 else 1e-3
        x = x.requires_grad_()
        value = reward(x)
        if not value.requires_grad:
            raise Fail("the value has no graph")
        (grad,) = torch.autograd.grad(value.sum(), x)
        if not grad.isfinite().all():
            raise Fail("it is not finite")
        with torch.no_grad():
            rise = (reward(x + size * step) - reward(x - size * step)) / (2 * size)
        slope = (grad * step).flatten(1).sum(1)
        off = float((rise - slope).abs().max() / (rise.abs().max() + slope.abs().max()).clamp_min(1e-6))
        item.note = f"within {off:.1g} of finite differences"
        if off > (0.01 if x.dtype == torch.float64 else 0.1):
            raise Fail(f"finite differences say {rise[:3].tolist()}, the gradient {slope[:3].tolist()}")


def _samples(domain: str | None) -> Iterator[Tensor]:
    """Samples of the usual shapes."""
    for shape in _SHAPES.get(domain or "", ()) if domain else [s for v in _SHAPES.values() for s in v]:
        noise = Noise.of(7, shape[0])
        if len(shape) == 3:
            yield torch.nn.functional.one_hot(noise.uniform(*shape[1:]).argmax(-1), shape[-1]).float()
        else:
            yield noise.normal(*shape[1:]) if len(shape) == 2 else noise.uniform(*shape[1:])


def _inside(domain: str | None, x: Tensor) -> Tensor:
    """Relaxed sequences, where guidance looks; other samples as they are."""
    return 0.9 * x + 0.1 / x.shape[-1] if x.ndim == 3 and domain != "vector" else x


def _direction(domain: str | None, x: Tensor) -> Tensor:
    d = Noise.of(8, len(x)).normal(*x.shape[1:], dtype=x.dtype)
    return d - d.mean(-1, keepdim=True) if x.ndim == 3 else d  # along the simplex


def defaults_of(entry: Entry) -> dict[str, Any]:
    return {k: s.default for k, s in settings_of(entry.config).items()} if entry.config else {}


# ---- models


def model(checklist: Checklist, entry: Entry, settings: Mapping[str, Any] | None = None) -> None:
    sampler = {"steps": 4}
    made: list[Model] = []
    with checklist.item(label_of(entry, "it can be built")) as item:
        try:
            model = entry.build(settings or {}, sampler)
        except DavBenchError as err:  # it refuses: a path that has no default, weights that are not there
            raise Skip(f"{reason_of(err)}; check_model({entry.name!r}, **settings) takes yours") from err
        model.to("cpu").network.eval()
        made.append(model)
        number = sum(p.numel() for p in model.trainable().values())
        item.note = f"{number} trainable parameters"
        if not number:
            raise Fail("no parameter requires a gradient", "leave what methods may train with requires_grad")
    if not made:
        return
    model = made[0]
    with checklist.item(
        label_of(entry, "it gives what it is registered with"), "make provides= agree with the process"
    ) as item:
        values = {
            **defaults_of(entry),
            **(settings or {}),
            **sampler,
            "eta": getattr(model.process, "eta", 1.0),
        }
        gives = active(entry.provides, values)
        own = set(model.provides) | {"data", "target", "target.samples"}
        if gives - own:
            raise Fail(f"registered with {', '.join(sorted(gives - own))}, which its process cannot do")
        if ("data" in gives) != (model.data is not None):
            raise Fail("`data` is registered without real samples, or they are not registered")
        if model.domain != entry.domain:
            raise Fail(f"registered for {entry.domain}, the object says {model.domain}")
        item.note = ", ".join(sorted(gives))
    meter = Meter()
    with checklist.item(
        label_of(entry, "a sample depends on its own noise alone"), "no global randomness, no batch norm"
    ):
        context = _context(model, meter)
        torch.manual_seed(1)
        many = Rollout()(context, Noise.of(3, 4)).states[-1]
        torch.manual_seed(2)
        alone = Rollout()(context, Noise.of(3, 4)[1:2]).states[-1]
        if not torch.allclose(many[1:2].double(), alone.double(), rtol=1e-3, atol=1e-3):
            raise Fail("the same noise gave another sample without its neighbours")
        shape = model.decode(model.process.clean(model.unpack(many))).shape
        if len(shape) != {"vector": 2, "sequence": 3, "image": 4}.get(model.domain, len(shape)):
            raise Fail(f"decode gives {tuple(shape)}, which is no {model.domain}")
    with checklist.item(
        label_of(entry, "training leaves its pretrained twin alone"), "share no tensors with it"
    ):
        twin = model.reference()
        shared = {p.data_ptr() for p in model.trainable().values() if p.numel()}
        if shared & {p.data_ptr() for p in twin.network.parameters() if p.requires_grad}:
            raise Fail("the reference trains along")


def _context(model: Model, meter: Meter) -> Any:
    model.attach(meter)
    return Context(model, model.reference(), lambda sample, cond: sample.flatten(1).sum(1), meter)


# ---- metrics


def metric(checklist: Checklist, entry: Entry) -> None:
    tasks = [t for t in all_tasks().found.values() if any(entry.name in t.metrics[r] for r in ROLES)]
    tasks.sort(key=lambda t: t.name not in TOYS)
    names = [t.name for t in tasks] or [t for t in TOYS if _domain(t) == entry.domain or entry.domain is None]
    label = label_of(entry, "it measures")
    plain = [name for name in names if not find_task(name).prompts]
    if names and not plain:
        checklist.skip(label, f"{names[0]} has prompts: it is measured in runs alone")
        return
    names = plain
    if not names:
        checklist.skip(label, f"no task uses it and no toy is of the domain {entry.domain}")
        return
    task = find_task(names[0])
    fix = "unit='sample' gives (n,) numbers, unit='set' one, None where it has no meaning"
    with checklist.item(label, fix) as item:
        from dav_bench.build import build_model, build_reward
        from dav_bench.builtin.metrics.base import MetricContext, Samples
        from dav_bench.cli.run import planned

        few = ["eval.samples=8"] + (["sampler.steps=4"] if "parallel" in str(task.model) else [])
        spec = planned(methods=["pretrained"], tasks=[task.name], sets=few, baselines=False, search=None)[
            0
        ].spec
        model = build_model(spec)
        model.to("cpu").network.eval()
        batch = Rollout(keep=False)(_context(model, Meter()), Noise.of(5, 8))
        x = model.decode(model.process.clean(model.process.unpack(batch.states[-1])))
        reward = build_reward(spec, "train")
        with torch.no_grad():
            values = reward(x.to(model.device)).double().numpy()
        ctx = MetricContext(task=task, pretrained=model.reference, rewards={"train": values}, reward=reward,
                            policy=lambda: model)  # fmt: skip
        measure = entry.load()
        first = measure(Samples(x), ctx)
        item.note = f"on {task.name}"
        if first is None:
            raise Skip(f"it has no meaning on {task.name}")
        _shape(entry, first, len(x))
        if entry.unit == "sample":
            return
        order = torch.arange(len(x)).flip(0)
        turned = replace(ctx, rewards={"train": values[::-1].copy()})
        second = measure(Samples(x[order]), turned)
        a, b = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (first, second))
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise Fail("it depends on the order of the samples", "sort, or draw from a seed of ctx.seed")


def _shape(entry: Entry, value: Any, n: int) -> None:
    found = torch.as_tensor(value).shape
    if entry.unit == "sample" and found != (n,):
        raise Fail(f"{n} samples gave shape {tuple(found)}")
    if entry.unit == "set" and found not in ((), (1,)):
        raise Fail(f"unit 'set' gave shape {tuple(found)}")


def _domain(task: str) -> str | None:
    return catalog().get("models", find_task(task).model["use"]).domain


# ---- tasks and trackers


def task(checklist: Checklist, entry: Entry, run: bool = True) -> None:
    with checklist.item(label_of(entry, "everything it names exists")):
        task = find_task(entry.name)
        if task.origin not in (entry.origin, "shipped"):
            raise Fail(f"{task.origin} shadows it", "move the other copy away")
        task_files.check_task(task, catalog())
        if not task.title:
            raise Fail("it has no title", "title = 'one line'")
        if not [m for role in ROLES for m in task.metrics[role]] and "heldout" not in task.rewards:
            raise Fail("it measures nothing", "metrics.quality = ['reward']")
        listed = {m for role in ROLES for m in task.metrics[role]} | set(DERIVED)
        if set(task.rank.get("by", ())) - listed:
            raise Fail("it ranks by what it does not measure")
    if not run:
        return
    with (
        sandbox() as (out, _),
        checklist.item(label_of(entry, "its pretrained model can be sampled and measured")) as item,
    ):
        from dav_bench.cli.run import planned

        task = find_task(entry.name)
        (one,) = planned(methods=["pretrained"], tasks=[entry.name], sets=["eval.samples=8"], baselines=False,
                         search=None, out=out)  # fmt: skip
        if one.status == "skip":
            raise Fail(one.reason, one.fix)
        done = execute_anew(one, out)
        missing = {m for r in ROLES for m in task.metrics[r]} - set(done.metrics()["metric"]) - set(DERIVED)
        item.note = f"8 samples; no value of {', '.join(sorted(missing))}" if missing else "8 samples"


def tracker(checklist: Checklist, entry: Entry) -> None:
    made: list[Any] = []
    with checklist.item(
        label_of(entry, "it hears something"), "name its methods after the life hooks"
    ) as item:
        try:
            tracker = entry.build({})
        except ImportError as err:
            raise Skip(f"{err}: its library is not installed") from err
        heard = [hook for hook in LIFE if callable(getattr(tracker, hook, None))]
        public = [n for n in dir(tracker) if not n.startswith("_") and callable(getattr(tracker, n))]
        astray = [f"{n}{near(n, LIFE)}" for n in public if n not in LIFE and "did you mean" in near(n, LIFE)]
        if astray:
            raise Fail(f"no such hook: {', '.join(astray)}")
        if not heard:
            raise Fail(f"it has none of {', '.join(LIFE)}")
        for hook in heard:
            if len(inspect.signature(getattr(tracker, hook)).parameters) != 1:
                raise Fail(f"{hook} takes one argument, the event")
        item.note = ", ".join(heard)
        made.append(tracker)
    if not made:
        return
    strict, plugins().strict = plugins().strict, True
    try:
        with sandbox() as (out, _):
            with (
                Writes((out, out.parent / "tmp")) as writes,
                checklist.item(label_of(entry, "it follows a run without an error")),
            ):
                run = planned_small(catalog().get("methods", "dav"), "toy-tokens", out)[0]
                execute_anew(run, out, made[0])
            with checklist.item(
                label_of(entry, "it writes nowhere but in the run directory"),
                "write below `event.run_dir` of run_started",
            ):
                if writes.found:
                    raise Fail("; ".join(f"{p} (by {w})" for p, w in list(writes.found.items())[:4]))
    finally:
        plugins().strict = strict
