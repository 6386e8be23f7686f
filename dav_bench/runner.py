"""One run, from specification to samples: the only place where the harness meets the science."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench import build
from dav_bench.env import environment
from dav_bench.errors import DavBenchError, ExitCode, OutOfTime
from dav_bench.events import RoundFinished, RunFinished, RunStarted, SamplesReady
from dav_bench.files import DiskFull
from dav_bench.plan import UNTIL_SPENT
from dav_bench.plugins import catalog, emit
from dav_bench.prompts import Prompts
from dav_bench.seeds import stream
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir
from dav_bench.tasks import ROLES, TaskSpec, find_task

if TYPE_CHECKING:
    import torch

    from dav_bench.core import Batch, Context, MeteredReward, Method, Model, Noise

SHOWN = 6
"""Pictures of each evaluation prompt on the sheet of a run."""

OTHERS = 2
"""Pictures there of each other training prompt, which nothing measures."""

TRAIN_PHASES = ("search", "fit")
"""Phases whose cost is training; `sample` is what a sample costs and `eval` what measuring costs."""


OVERSHOOT = 1.1
"""Share of a budget above which its training is said to have gone beyond it."""


@dataclass(frozen=True)
class Options:
    """How runs are executed: recorded with each run, no part of its identity."""

    out: Path = Path("results")
    """Results folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """float32, float64 or bfloat16 (autocast); auto is bfloat16 on CUDA and float32 elsewhere."""
    threads: int | None = None
    """CPU threads; None leaves it to torch."""
    micro_batch: int | None = None
    """Most network rows computed at once; None is automatic."""
    fresh: bool = False
    """Rerun what is finished, and discard what an unfinished run left."""
    deterministic: bool = False
    """An operation that has no reproducible implementation is an error; off, it warns on CUDA."""
    listeners: tuple[Any, ...] = ()
    """Objects with life hooks, told of this command's runs only: a progress display."""


@dataclass(frozen=True)
class Machine:
    """Where a run computes; stored with it, and a resume uses what is stored."""

    device: str
    dtype: str
    threads: int
    micro_batch: int
    deterministic: bool = False

    @classmethod
    def choose(cls, options: Options, stored: Mapping[str, Any]) -> Machine:
        import torch

        cuda = torch.cuda.is_available()
        device = options.device if options.device != "auto" else "cuda" if cuda else "cpu"
        if device.startswith("cuda") and not cuda:
            raise DavBenchError(
                f"device '{device}' was asked for and there is none.",
                "This torch sees no CUDA device.",
                "--device cpu, or `dav-bench env` to see what torch finds",
            )
        try:
            device = str(torch.device(device))
        except RuntimeError as err:
            raise DavBenchError(
                f"unknown device '{device}'.", str(err).split("\n")[0], "--device auto"
            ) from err
        dtype = (
            options.dtype
            if options.dtype != "auto"
            else "bfloat16"
            if device.startswith("cuda")
            else "float32"
        )
        if dtype not in ("float32", "float64", "bfloat16"):
            raise DavBenchError(
                f"unknown dtype '{dtype}'.", "Known: float32, float64, bfloat16.", "--dtype auto"
            )
        threads = options.threads or torch.get_num_threads()
        micro_batch = options.micro_batch or (2048 if device.startswith("cuda") else 256)
        chosen = cls(device, dtype, threads, micro_batch, options.deterministic)
        if not stored:
            return chosen
        kept = cls(**{f.name: stored.get(f.name, f.default) for f in fields(cls)})
        if kept.device.startswith("cuda") and not cuda:
            raise DavBenchError(
                "this run was begun on a GPU and there is none here.",
                "A resume uses the device, dtype, threads and micro-batch it was begun with.",
                "resume it there, or start over with --fresh",
            )
        return kept

    def apply(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        cuda = self.device.startswith("cuda")
        if cuda:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
        wanted = self.deterministic or cuda
        if wanted or torch.are_deterministic_algorithms_enabled():  # a call imports a compiler, even to leave it off
            torch.use_deterministic_algorithms(wanted, warn_only=not self.deterministic)


def execute(spec: RunSpec, options: Options) -> RunDir:
    """Run `spec`, or find it finished; a killed or interrupted run goes on from its last round.

    Never raises for what goes wrong inside the run: the status and the message are in the run directory.

    Raises:
        KeyboardInterrupt: after the run was recorded as interrupted.
        DavBenchError: the run could not begin (missing asset, another process owns it, ...).
    """
    run = RunDir.create(options.out, spec, fresh=options.fresh)
    with run:
        if run.status == "done":
            return run
        start, status, error = time.monotonic(), "failed", ""
        try:
            _Run(spec, run, options).go()
            status = "done"
        except KeyboardInterrupt:
            status, error = "interrupted", "stopped by the user; the same command resumes it"
            raise
        except OutOfTime as err:
            status, error = "timeout", str(err)
            run.log(f"{status}: {error}")
        except Exception as err:
            status, error = _diagnose(err)
            run.log(f"{status}: {error}")
            if os.environ.get("DAV_BENCH_TRACEBACK"):
                raise
            if isinstance(err, DavBenchError) and err.code == ExitCode.MISSING:
                raise
        finally:
            run.update(status=status, error=error or None)
            if status == "done":  # only now: a kill before this line resumes from it
                run.drop_checkpoint()
            run.event("run_finished", status=status, error=error)
            took, warnings = time.monotonic() - start, tuple(run.meta.get("warnings", ()))
            event = RunFinished(spec, run.path, status, error, final_metrics(run), took, warnings)
            emit(event, options.listeners)
    return run


def draw(
    run: RunDir, n: int, options: Options, search: Mapping[str, Any] | None = None, seed: int = 0,
    prompts: Sequence[str] = (),     say: Callable[[str], None] = print, chunk: int = 256,
) -> tuple[Any, Any]:  # fmt: skip
    """More samples of a finished run: (Samples, training rewards (n,)).

    Args:
        run: a run that is done.
        n: how many; a larger n with the same seed begins with the same samples.
        search: test-time search as in `RunSpec.search`; None samples as the run did.
        seed: of the sampling noise.
        prompts: drawn in turn; none are those the run was evaluated on.
        say: told how far it is, a line at a time.
        chunk: samples drawn together, which bounds memory.
    """
    import torch

    from dav_bench.core import Noise

    made = RunSpec.from_dict(run.spec)
    spec = replace(made, search=search) if search else made
    if prompts:
        spec = _asked_for(spec, prompts)
    if run.status != "done":
        raise DavBenchError(
            f"run {run.path.name} is not finished ({run.status}).", fix="repeat its command: it goes on"
        )
    job = _Run(spec, run, options, resume=False)  # another machine may draw: nothing is continued here
    job.prepare()
    if job.method.loss is not None:
        base = options.out / made.base().dirname  # a search holds no weights: its base run does
        job.load(RunDir.open(base) if made.search else run)
    searcher, parts, rewards = job.sampler(), [], []
    for start in range(0, n, chunk):
        noise = Noise.of(stream(seed, "sample"), min(chunk, n - start), start, job.machine.device)
        batch = searcher(job.ctx, noise, job._cond(job.prompts.evaluation(len(noise), start)))
        parts.append(job.samples(batch))
        rewards.append(batch.reward.detach().cpu())
        say(f"{min(start + chunk, n)} of {n} samples")
    cond = None if parts[0].cond is None else torch.cat([p.cond for p in parts])
    merged = type(parts[0])(torch.cat([p.x for p in parts]), cond, job.prompts.texts)
    return merged, torch.cat(rewards).double().numpy()


def _asked_for(spec: RunSpec, prompts: Sequence[str]) -> RunSpec:
    """The run with other prompts to draw."""
    if not spec.prompts:
        raise DavBenchError(f"task {spec.task!r} reads no prompts.", fix="leave --prompt out")
    if any(not text.strip() for text in prompts):
        raise DavBenchError("a prompt is empty.", fix="leave it out")
    return replace(spec, prompts={**spec.prompts, "eval": list(prompts)})


def _diagnose(err: Exception) -> tuple[str, str]:
    """(status, message with a hint) of what ended a run."""
    import torch

    from dav_bench.core import NonFinite

    text = " ".join(str(err).split()) or type(err).__name__
    if isinstance(err, NonFinite):
        return "nan", f"{text}; check the reward on such samples, or lower the learning rate or raise alpha"
    if isinstance(err, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "oom", f"out of memory: {text[:200]}; repeat with a smaller --micro-batch and --fresh"
    if isinstance(err, DiskFull) or (isinstance(err, OSError) and err.errno == 28):
        return "disk", f"{text}; free some space, then the same command goes on"
    if isinstance(err, DavBenchError):
        return "failed", text
    return "failed", f"{type(err).__name__}: {text[:500]} (DAV_BENCH_TRACEBACK=1 shows where)"


def final_metrics(run: RunDir) -> dict[str, float]:
    """Final metrics of a run by name; empty before it is done."""
    frame = run.metrics()
    rows = frame.filter(frame["split"] == "final") if frame.height else frame
    return dict(zip(rows["metric"], rows["value"], strict=True)) if rows.height else {}


def _peak_memory(device: str) -> Callable[[], float]:
    """Starts counting; calling it gives the peak MB since: of the device on CUDA, else of this process."""
    import resource

    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    except OSError:
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path("/proc/self/status")
    return lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


class _Run:
    """The parts of one run while it lasts."""

    def __init__(self, spec: RunSpec, run: RunDir, options: Options, resume: bool = True) -> None:
        self.spec, self.run, self.options = spec, run, options
        self.task: TaskSpec = find_task(spec.task)
        self.machine = Machine.choose(options, run.env.get("execution", {}) if resume else {})
        self.method: Method = build.build_method(spec)
        self.prompts = Prompts.of(spec.prompts)
        self.start = time.monotonic()

    def prepare(self, meter: Mapping[str, Any] | None = None) -> None:
        """Model, reference and training reward, on the machine of this run."""
        import torch

        from dav_bench.core import Context, Meter

        self.machine.apply()
        self.meter = Meter(meter)
        dtype = getattr(torch, self.machine.dtype)
        self.model: Model = build.build_model(self.spec).to(self.machine.device, dtype)
        self.model.attach(self.meter, self.machine.micro_batch)
        self.model.network.eval()
        if self.prompts:  # each is encoded once, before anything is copied
            self.model.encode(self.prompts.texts)
        self.reference = self.model.reference()
        self.reward = self._reward("train")
        reward = build.wrap_reward(self.spec, "train", self.reward)
        self.ctx: Context = Context(self.model, self.reference, reward, self.meter)
        if self.method.loss is not None:
            self.ctx.modules = self.method.loss.modules(self.ctx)

    def go(self) -> None:
        """Train, search or both; evaluate; save."""
        last = self.run.load_checkpoint()
        if not self.run.env:
            execution = {"execution": vars(self.machine), "assets": self.task.asset_hashes}
            self.run.write_env(environment() | execution)
        rounds = self.method.training.rounds if self.trains and self.method.training else 0
        done = last[0] if last else 0
        started = RunStarted(self.spec, self.run.path, self.spec.label, self.run.env, rounds, done)
        emit(started, self.options.listeners)
        self.run.event("run_started", resumed=done)
        self.run.update(reproducible=self.spec.reproducible)
        peak = _peak_memory(self.machine.device)
        self.prepare(last[2]["meter"] if last else None)
        if self.trains:
            self._train(last)
        elif self.spec.search:
            self._tuned()
        self._evaluate(self.sampler())
        if self.trains:
            self.run.save_weights(self._weights())
            if hasattr(self.model, "save"):  # in the form that other tools load
                self.model.save(self.run.path / "artifacts" / "model")
        self.run.update(meter=self.meter.state(), peak_mb=round(peak(), 1))

    def sampler(self) -> Any:
        """How this run's samples are drawn: test-time search, the method's own search, or the tuned model."""
        from dav_bench.core import Rollout

        if self.spec.search:
            return build.build_search(self.spec)
        if self.method.sampler is not None:
            return self.method.sampler
        return Rollout(keep=False) if self.trains else self.method.search

    @property
    def trains(self) -> bool:
        return self.method.loss is not None and self.spec.search is None

    @cached_property
    def _judge(self) -> MeteredReward:
        """The held-out reward, loaded when samples are first judged."""
        return self._reward("heldout")

    def _reward(self, role: str) -> MeteredReward:
        import torch

        from dav_bench.core import MeteredReward

        reward = build.build_reward(self.spec, role)
        if isinstance(reward, torch.nn.Module):
            reward = reward.to(self.machine.device).eval().requires_grad_(False)
            reward = reward.double() if self.machine.dtype == "float64" else reward
        if self.prompts and hasattr(reward, "encode"):
            reward.encode(self.prompts.texts)
        return MeteredReward(reward, self.meter, self.machine.micro_batch, role)

    def _cond(self, numbers: torch.Tensor | None) -> torch.Tensor | None:
        """Prompt numbers where the model computes."""
        return None if numbers is None else numbers.to(self.machine.device)

    def _noise(self, seed: int, n: int, start: int = 0) -> Noise:
        from dav_bench.core import Noise

        return Noise.of(seed, n, start, device=self.machine.device)

    # ---- training

    def _tuned(self) -> None:
        """Load the tuned weights of the base run; that run is made if it is missing."""
        base = execute(self.spec.base(), replace(self.options, fresh=False))
        if base.status != "done":
            raise DavBenchError(
                f"{self.spec.label} searches on a tuned model, and training it ended as '{base.status}'.",
                str(base.meta.get("error") or ""),
                f"dav-bench results show {base.path.name}",
            )
        self.load(base)
        for phase in TRAIN_PHASES:  # what training cost belongs to this row too
            self.meter.phases[phase].update(base.meta["meter"].get(phase, {}))

    def load(self, run: RunDir) -> None:
        """Put the final weights of a run into the model, and what its method kept beside them."""
        self._put(run.load_weights(), f"{run.path} holds weights of another network.")

    def _weights(self) -> dict[str, torch.Tensor]:
        """The policy's trained parameters, and all parameters and buffers of the loss as `<module>/<name>`."""
        named = dict(self.model.trainable().items())
        held = {f"{key}/{n}": v for key, m in self.ctx.modules.items() for n, v in m.state_dict().items()}
        return {name: value.detach().cpu().contiguous() for name, value in (named | held).items()}

    def _put(self, weights: Mapping[str, torch.Tensor], refusal: str) -> None:
        own = self.model.trainable()
        kept = {f"{key}/{name}" for key, module in self.ctx.modules.items() for name in module.state_dict()}
        if set(weights) != own.keys() | kept:
            raise DavBenchError(refusal, fix="repeat its run with --fresh")
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])
        for key, module in self.ctx.modules.items():
            start = f"{key}/"
            module.load_state_dict({n[len(start) :]: v for n, v in weights.items() if n.startswith(start)})

    def _train(self, last: tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None) -> None:
        from dav_bench.core.fit import fit, optimizer, parameters

        loss, plan = self.method.loss, self.method.training
        if loss is None or plan is None:
            raise ValueError("a method that trains needs a loss and its training settings")
        opt = optimizer(parameters(self.ctx), plan, self.ctx.modules)
        first = self._restore(opt, last) if last else 0
        self.run.rewind_metrics(first)
        ended = bool(last and last[2]["ended"])
        for r in range(first + 1, plan.rounds + 1):
            if ended:
                break
            began, spent = time.monotonic(), self._spent()
            with self.meter.phase("search"):
                noise = self._noise(stream(self.spec.seed, "search", r), plan.samples)
                cond = self._cond(self.prompts.training(plan.samples, stream(self.spec.seed, "prompts", r)))
                batch = self.method.search(self.ctx, noise, cond)
            with self.meter.phase("fit"):
                noise = self._noise(stream(self.spec.seed, "fit", r), 1)
                stats = fit(loss, self.ctx, batch, opt, plan, noise, self._course(r, plan.rounds, spent))
            stats |= batch.stats | self._progress(batch) | {"seconds": time.monotonic() - began}
            rows = self._rows(r, "train", {k: (v, plan.samples) for k, v in stats.items()})
            every = int(self.spec.eval.get("every", 0))
            if every and r % every == 0 and r < plan.rounds:
                drawn = self._draw(self.sampler(), "eval")
                rows += self._rows(r, "eval", self._measure(drawn, self.samples(drawn))[0])
            self.run.append_metrics(rows)
            median = stats["reward"]
            ended = self._spent() >= 1 or (plan.stop_reward is not None and median >= plan.stop_reward)
            self._save(r, opt, ended)
            if plan.rounds >= UNTIL_SPENT and self._spent() == 0:
                raise DavBenchError(
                    "training would never end.",
                    f"A round spends nothing that a budget in {self.spec.budget.get('unit')} counts.",
                    f"--budget cost=20000, or --set {self.spec.method}.rounds=10",
                )
            shown = {f"train/{k}": float(v) for k, v in stats.items()}
            so_far = (self.meter.state(), int(self.meter.cost()), time.monotonic() - self.start)
            share = 1.0 if ended else max(r / plan.rounds, self._spent())
            emit(RoundFinished(self.spec, r, plan.rounds, shown, *so_far, share), self.options.listeners)
            self.run.event("round_finished", round=r, **{k: float(v) for k, v in stats.items()})
        self._warn_of_overshoot()

    def _warn_of_overshoot(self) -> None:
        """Say where rounds, which are never cut, carried training beyond its budget."""
        spent, rounds = self._spent(), int(self.run.metrics()["round"].max() or 0)  # type: ignore[arg-type]
        if spent <= OVERSHOOT:
            return
        way_out = f"fewer samples a round keep to it (--set {self.spec.method}.samples=...)"
        what = "its only round: the budget is smaller than one" if rounds == 1 else f"{rounds} whole rounds"
        warning = f"training spent {100 * spent:.0f} % of its budget in {what}; {way_out}"
        self.run.update(warnings=[warning])
        self.run.log(f"warning: {warning}")

    def _spent(self) -> float:
        """Share of the training budget that is spent, by earlier processes too; 0 without a budget."""
        limit = self.spec.budget.get("train")
        if not isinstance(limit, int | float):
            return 0.0
        return self.meter.spent(str(self.spec.budget["unit"]), *TRAIN_PHASES) / limit

    def _course(self, r: int, rounds: int, before: float) -> tuple[float, float]:
        """Share of all training done before and after round r: of the rounds, or of the budget where that is more.

        What the round will have spent is not known before its fit: at least its search, and about as much as a
        round did on average, `before` / (r - 1).
        """
        after = max(self._spent(), before * r / (r - 1) if r > 1 else 0.0)
        return min(1.0, max((r - 1) / rounds, before)), min(1.0, max(r / rounds, after))

    def _progress(self, batch: Batch) -> dict[str, float]:
        """Reward and diversity of what the search found, for curves and the progress line."""
        found = {"reward": float(batch.reward.double().nanmedian())}
        if self.model.domain == "image":  # looking at a picture costs as much as drawing it: `eval.every` does that
            return found
        samples = self.samples(batch)
        for name in self.task.metrics["diversity"]:
            entry = catalog().get("metrics", name)
            if entry.unit == "set":
                found[name] = float(entry.load()(samples, self._metric_context({})))
        return found

    # ---- checkpoints

    def _save(self, r: int, opt: torch.optim.Optimizer, ended: bool) -> None:
        from dav_bench.core.fit import parameters

        tensors = {f"weight.{name}": value for name, value in self._weights().items()}
        steps = {}
        for name, parameter in parameters(self.ctx).items():
            for key, value in opt.state.get(parameter, {}).items():
                if key == "step":
                    steps[name] = float(value)
                else:
                    tensors[f"{key}.{name}"] = value.detach().cpu()
        self.run.save_checkpoint(r, tensors, {"meter": self.meter.state(), "steps": steps, "ended": ended})
        self.run.update(meter=self.meter.state())

    def _restore(
        self, opt: torch.optim.Optimizer, last: tuple[int, dict[str, torch.Tensor], dict[str, Any]]
    ) -> int:
        import torch

        from dav_bench.core.fit import parameters

        r, tensors, scalars = last
        weights = {n.removeprefix("weight."): v for n, v in tensors.items() if n.startswith("weight.")}
        self._put(weights, f"the checkpoint in {self.run.path} is of another network.")
        for name, parameter in parameters(self.ctx).items():
            if name in scalars["steps"]:
                moments = {k: tensors[f"{k}.{name}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")}
                opt.state[parameter] = {"step": torch.tensor(scalars["steps"][name]), **moments}
        return r

    # ---- evaluation

    def _draw(self, searcher: Any, phase: str) -> Batch:
        """The evaluation samples: noise depends on the protocol alone, so methods are compared on the same noise."""
        with self.meter.phase(phase):
            n = int(self.spec.eval["samples"])
            return searcher(self.ctx, self._eval_noise(n), self._cond(self.prompts.evaluation(n)))

    def _eval_noise(self, n: int, start: int = 0) -> Noise:
        """Seeds of a method that trains nothing are seeds of its sampling; seed 0 shares the noise of the others."""
        untrained = self.method.loss is None and self.spec.seed
        axes = (self.spec.seed,) if untrained else ()
        return self._noise(stream(int(self.spec.eval["seed"]), "eval", *axes), n, start)

    def _evaluate(self, searcher: Any) -> None:
        batch = self._draw(searcher, "sample")
        samples = self.samples(batch)
        metrics, columns = self._measure(batch, samples)
        if self.model.domain == "image":
            columns["file"] = self._pictures(samples, searcher)
        done = int(self.run.metrics()["round"].max() or 0) if self.run.metrics().height else 0  # type: ignore[arg-type]
        self.run.write_samples(columns)
        if not final_metrics(self.run):  # else a kill came after this line; they are the same numbers
            noticed = {name: (float(value), len(batch.reward)) for name, value in batch.stats.items()}
            self.run.append_metrics(self._rows(done, "search", noticed) + self._rows(done, "final", metrics))
        table = self.run.samples()
        emit(
            SamplesReady(self.spec, self.run.path, table, lambda i: table.row(i, named=True)),
            self.options.listeners,
        )

    def _pictures(self, samples: Any, searcher: Any) -> list[str]:
        """Writes the pictures, and a sheet of some beside what the pretrained model makes of the same noise."""
        import torch

        from dav_bench.core import Rollout
        from dav_bench.report.pictures import save_grid, save_images

        n = min(len(samples), SHOWN * max(1, len(self.prompts.eval)))
        others = self.prompts.others(OTHERS)
        before, after = None, [samples.x[:n]]
        names = samples.prompts or [""] * len(samples)
        shown = names[:n] + [self.prompts.texts[k] for k in others.tolist()]
        parts = [(self._eval_noise(n), self._cond(self.prompts.evaluation(n)))]
        with self.meter.phase("eval"):
            if len(others):
                parts.append((self._eval_noise(len(others), start=len(samples)), self._cond(others)))
                after.append(self.samples(searcher(self.ctx, *parts[1])).x)
            if self.method.loss is not None or not isinstance(searcher, Rollout):  # else these are they
                plain = Rollout(keep=False, on="ref")
                before = torch.cat([self.samples(plain(self.ctx, *part)).x for part in parts])
        folder = self.run.path / "artifacts"
        save_grid(folder, before, torch.cat(after), shown)
        return save_images(folder / "images", samples.x, names)

    def samples(self, batch: Batch) -> Any:
        """Decoded samples on the CPU."""
        import torch

        from dav_bench.builtin.metrics.base import Samples

        process = self.model.process
        with torch.no_grad():
            x = self.model.decode(process.clean(process.unpack(batch.states[-1])))
        return Samples(x.cpu(), None if batch.cond is None else batch.cond.cpu(), self.prompts.texts)

    def _metric_context(self, rewards: dict[str, Any]) -> Any:
        from dav_bench.builtin.metrics.base import MetricContext
        from dav_bench.core import Rollout

        plain = isinstance(self.sampler(), Rollout)
        return MetricContext(task=self.task, pretrained=lambda: self.reference, rewards=rewards,
                             seed=int(self.spec.eval["seed"]), device=self.machine.device,
                             reward=self.reward.reward, policy=(lambda: self.model) if plain else None)  # fmt: skip

    def _measure(self, batch: Batch, samples: Any) -> tuple[dict[str, tuple[float, int]], dict[str, Any]]:
        """Metrics as (value, samples) by name, and the columns of samples.parquet."""
        import numpy as np
        import torch

        n = len(samples)
        rewards: dict[str, Any] = {"train": batch.reward.detach().cpu().double().numpy()}
        columns: dict[str, Any] = {
            "index": np.arange(n),
            "noise_seed": self._eval_noise(n).keys.cpu().numpy(),
        }
        if samples.sequences is not None:
            columns["sequence"] = samples.sequences
        if samples.prompts is not None:
            columns["prompt"] = samples.prompts
        with self.meter.phase("eval"), torch.no_grad():
            if self.spec.heldout and "heldout" in self.spec.rewards:
                rewards["heldout"] = self._judge(samples.x.to(self.machine.device), batch.cond).cpu().double().numpy()
            names = {"train": "reward", "heldout": "reward-heldout"}
            metrics = {names[role]: (float(np.median(v)), n) for role, v in rewards.items()}
            columns |= {f"reward.{role}": values for role, values in rewards.items()}
            ctx, count = self._metric_context(rewards), Counter(samples.prompts)
            for role in ROLES:
                for name in self.task.metrics[role]:
                    entry = catalog().find("metrics", name)
                    if name in metrics or entry is None:  # a reward, or the gap that boards derive
                        continue
                    value = entry.load()(samples, ctx)
                    if value is None:  # has no meaning for these samples
                        continue
                    if entry.unit == "sample":
                        columns[f"metric.{name}"] = value
                        value = np.mean(value) if entry.reduce == "mean" else np.median(value)
                    parts = value if isinstance(value, Mapping) else {"": value}  # "" is the metric itself
                    metrics[name] = (float(parts[""]), n)
                    metrics |= {f"{name}/{part}": (v, count.get(part, n)) for part, v in parts.items() if part}
        return metrics, columns

    def _rows(self, r: int, split: str, metrics: Mapping[str, tuple[float, int]]) -> list[dict[str, Any]]:
        spent = {
            "cost": int(self.meter.cost(*TRAIN_PHASES)),
            "reward_rows": int(self.meter.reward_rows(*TRAIN_PHASES)),
            "seconds": self.meter.total("seconds", *TRAIN_PHASES),
        }
        return [
            {"round": r, **spent, "split": split, "metric": name, "value": value, "n": n}
            for name, (value, n) in metrics.items()
        ]
