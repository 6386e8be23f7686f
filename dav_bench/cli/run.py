"""`dav-bench run`: from options to a plan, and through it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dav_bench.cli import complete
from dav_bench.errors import DavBenchError, ExitCode, near, problems
from dav_bench.launch import Limits, Outcome, launch, seconds, size
from dav_bench.plan import PlannedRun, Request, plan
from dav_bench.suites import Suite, find_suite

if TYPE_CHECKING:
    from dav_bench.runner import Options

_Names = list[str]


def run(
    method: Annotated[
        _Names | None,
        typer.Option(help="Methods, comma-separated.", autocompletion=complete.component("methods")),
    ] = None,
    task: Annotated[
        _Names | None, typer.Option(help="Tasks, comma-separated.", autocompletion=complete.task)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds, such as 0-4 or 0,3.")] = "0",
    set_: Annotated[
        _Names | None, typer.Option("--set", help="section.key=value; a,b,c makes a grid of runs.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the task file, such as paper.")] = None,
    search: Annotated[
        str,
        typer.Option(
            help="Searcher applied to tuned models at test time; auto is the method's own, or none.",
            autocompletion=complete.component("searchers", "auto", "none"),
        ),
    ] = "auto",
    searcher: Annotated[
        str | None,
        typer.Option(
            help="With --trainer: a method made of these two.", autocompletion=complete.component("searchers")
        ),
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="With --searcher: a method made of these two.", autocompletion=complete.component("trainers")
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Training reward: a name, or ./my.py:function.", autocompletion=complete.component("rewards")
        ),
    ] = None,
    reward_wrap: Annotated[
        str | None, typer.Option(help="nes: estimate the gradient of a black-box training reward.")
    ] = None,
    heldout: Annotated[bool, typer.Option(help="Read the held-out reward; tuning must not.")] = True,
    baselines: Annotated[bool, typer.Option(help="Add the task's baselines.")] = True,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What training may spend: cost=20000 (rows forward + 2 x backward), reward=5000 or seconds=60."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="A named grid, such as core; --task and --method pick from it."),
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="Rerun a spec.toml, and nothing else.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process of its own.")] = 1,
    timeout: Annotated[str | None, typer.Option(help="Longest time of a run: 2h, 90m, 45s.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most resident memory of a run: 8GB, 500MB (Linux).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...; cuda:0,cuda:1 for --jobs.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float64 or bfloat16.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each run; --jobs share the cores without.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Most network rows at once.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Fail rather than compute what may differ next time.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Rerun what is finished.")] = False,
    tracker: Annotated[
        _Names | None,
        typer.Option(
            help="Trackers told of each run, comma-separated.", autocompletion=complete.component("trackers")
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
) -> None:
    """Run methods on tasks, or reuse what is finished."""
    from dav_bench import plugins
    from dav_bench.cli import render

    plugins.require()
    limits = _limits(timeout, memory)
    if spec is not None:
        runs = [planned_from_spec(spec, out, fresh)]
    elif suite is not None:
        _refuse_with_suite(
            seeds=seeds != "0", set=set_, config=config, preset=preset, search=search != "auto", searcher=searcher,
            trainer=trainer, reward=reward, reward_wrap=reward_wrap, no_heldout=not heldout, budget=budget,
            no_baselines=not baselines,
        )  # fmt: skip
        chosen = find_suite(suite)
        runs = planned_suite(chosen, tasks=names(task), methods=names(method), out=out, fresh=fresh)
        threads = threads or chosen.threads
    else:
        runs = planned(
            methods=names(method), tasks=names(task), seeds=seed_list(seeds), sets=set_ or [], config=config,
            preset=preset, search=search, pair=_pair(searcher, trainer), reward=reward, wrap=reward_wrap,
            heldout=heldout, baselines=baselines, budget=budget, out=out, fresh=fresh,
        )  # fmt: skip
    from dav_bench.tasks import all_tasks

    shown = {r.task.name for r in runs}
    render.notice(n for n in all_tasks().notices if any(f"task {name!r} " in n for name in shown))
    if dry_run:
        from dav_bench.known import expected

        costs = expected(runs, out)
        render.emit_json(render.plan_json(runs, costs)) if json else render.plan_table(runs, costs, jobs)
        raise typer.Exit(ExitCode.OK if _possible(runs) else ExitCode.INCOMPATIBLE)
    from dav_bench.plugins import catalog
    from dav_bench.runner import Options

    chosen_trackers = names(tracker)
    for name in chosen_trackers:
        catalog().get("trackers", name)
    options = Options(
        out=out, device=device, dtype=dtype, threads=threads, micro_batch=micro_batch, fresh=fresh,
        deterministic=deterministic,
    )  # fmt: skip
    raise typer.Exit(go(runs, options, json, jobs=jobs, limits=limits, trackers=chosen_trackers))


def _limits(timeout: str | None, memory: str | None) -> Limits:
    return Limits(seconds(timeout) if timeout else None, size(memory) if memory else None)


def _refuse_with_suite(**given: Any) -> None:
    """A suite states what decides its numbers; only --task, --method and how it is executed are left to say."""
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if wrong:
        raise DavBenchError(
            f"--suite does not go with {', '.join(wrong)}.",
            "A suite states its own settings; --task and --method pick from it.",
            "name methods and tasks without --suite, or write a suite of your own in ./tasks/suites.toml",
        )


def planned(
    *, methods: Sequence[str], tasks: Sequence[str], seeds: Sequence[int] = (0,), sets: Sequence[str] = (),
    config: Path | None = None, preset: str | None = None, search: str | None = "auto",
    pair: tuple[str, str] | None = None, reward: str | None = None, wrap: str | None = None,
    heldout: bool = True, baselines: bool = True, budget: str | None = None, out: Path = Path("results"),
    fresh: bool = False,
) -> list[PlannedRun]:  # fmt: skip
    """The runs that a command line stands for."""
    from dav_bench.layers import budget_layer, config_layer, env_layer, set_layers
    from dav_bench.plugins import catalog
    from dav_bench.tasks import find_task

    if not methods and not pair:
        raise DavBenchError(
            "no method is named.", fix="--method dav, or --searcher tree --trainer forward-kl"
        )
    if not tasks:
        raise DavBenchError("no task is named.", fix="--task dna; `dav-bench list tasks` shows all")
    known = catalog()
    below = [config_layer(config)] if config else []
    below.append(env_layer(known))
    if budget is not None:
        below.append(budget_layer(budget))
    found = [find_task(name) for name in tasks]
    runs: dict[str, PlannedRun] = {}
    for point in set_layers(sets, known):
        request = Request(
            methods, found, seeds, [*below, point], preset, None if search == "none" else search, pair, reward,
            wrap, heldout, baselines,
        )  # fmt: skip
        for one in plan(request, known, out, fresh):
            runs.setdefault(one.spec.identity, one)
    return list(runs.values())


def planned_suite(
    suite: Suite, *, tasks: Sequence[str] = (), methods: Sequence[str] = (), out: Path = Path("results"),
    fresh: bool = False,
) -> list[PlannedRun]:  # fmt: skip
    """The runs of a suite, or those of some of its tasks and methods (baselines of a chosen task stay)."""
    runs: dict[str, PlannedRun] = {}
    for grid in suite.grids:
        chosen = [name for name in grid.task if not tasks or name in tasks]
        if not chosen:
            continue
        for one in planned(
            methods=grid.method, tasks=chosen, seeds=seed_list(grid.seeds), sets=grid.set, preset=grid.preset,
            search=grid.search, pair=_pair(grid.searcher, grid.trainer), reward=grid.reward, wrap=grid.reward_wrap,
            heldout=grid.heldout, baselines=grid.baselines, budget=grid.budget, out=out, fresh=fresh,
        ):  # fmt: skip
            if not methods or one.spec.method in {*methods, *one.task.baselines}:
                runs.setdefault(one.spec.identity, one)
    lacking = [f"task {name!r}{near(name, suite.tasks)}" for name in tasks if name not in suite.tasks]
    held = {run.spec.method for run in runs.values()}
    lacking += [f"method {name!r}{near(name, held)}" for name in methods if name not in held]
    if lacking:
        raise problems(f"suite {suite.name!r} does not have all of this.", lacking)
    return list(runs.values())


def planned_from_spec(path: Path, out: Path, fresh: bool) -> PlannedRun:
    """The run of a `spec.toml`; refused where the task has changed since."""
    from dav_bench.plan import state
    from dav_bench.spec import RunSpec
    from dav_bench.tasks import find_task

    try:
        spec = RunSpec.from_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise DavBenchError(f"{path} cannot be read.", str(err)) from err
    task = find_task(spec.task)
    if task.hash != spec.task_hash:
        raise DavBenchError(
            f"task {spec.task!r} has changed since {path} was written.",
            f"Its hash was {spec.task_hash} (version {spec.task_version}), now {task.hash} (version {task.version}).",
            "plan it anew with --method and --task",
        )
    status, reason = state(spec, out, fresh)
    return PlannedRun(
        spec, task, status, out / spec.dirname, reason, base=spec.base() if spec.search else None
    )


def go(
    runs: Sequence[PlannedRun], options: Options, json: bool = False, *, jobs: int = 1,
    limits: Limits | None = None, trackers: Sequence[str] = (),
) -> int:  # fmt: skip
    """Execute a plan and report; returns the exit code."""
    from dataclasses import replace

    from dav_bench.cli import render

    for skipped in (r for r in runs if r.status == "skip"):
        fix = f"; try {skipped.fix}" if skipped.fix else ""
        render.notice_line(f"skipped {skipped.spec.label} on {skipped.spec.task}: {skipped.reason}{fix}")
    if not _possible(runs):
        return ExitCode.INCOMPATIBLE
    todo = [r for r in runs if r.status != "skip"]
    outcomes: dict[Path, Outcome] = {}
    with render.Progress(len(todo), jobs) as progress:
        options = replace(options, listeners=(*options.listeners, progress))
        try:
            launch(todo, options, jobs=jobs, limits=limits, trackers=trackers, outcomes=outcomes)
        except KeyboardInterrupt:
            progress.say("interrupted; the same command goes on from here")
            return ExitCode.INTERRUPTED
    failed = [o for o in outcomes.values() if o.failed]
    render.summary(todo, outcomes, options.out, json)
    codes = {o.code for o in failed}
    if not failed:
        return ExitCode.OK
    return codes.pop() if len(codes) == 1 and len(failed) == len(todo) else ExitCode.RUN_FAILED


def _possible(runs: Sequence[PlannedRun]) -> bool:
    """Whether anything beyond the baselines can run."""
    asked = [r for r in runs if r.spec.method not in r.task.baselines] or list(runs)
    return any(r.status != "skip" for r in asked)


def names(values: Sequence[str] | None) -> list[str]:
    """Split repeated and comma-separated names."""
    out = [n.strip() for value in values or () for n in value.split(",") if n.strip()]
    return list(dict.fromkeys(out))


def seed_list(text: str) -> list[int]:
    """`0-2,5` is [0, 1, 2, 5]."""
    out: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            raise DavBenchError(
                f"--seeds {text!r} cannot be read.", fix="--seeds 0-4 or --seeds 0,3"
            ) from None
        if last < first:
            raise DavBenchError(f"--seeds {text!r} counts down.", fix=f"--seeds {last}-{first}")
        out += range(first, last + 1)
    return list(dict.fromkeys(out))


def _pair(searcher: str | None, trainer: str | None) -> tuple[str, str] | None:
    if searcher and trainer:
        return searcher, trainer
    if searcher or trainer:
        lacking = "--trainer" if searcher else "--searcher"
        raise DavBenchError(
            "--searcher and --trainer belong together.", fix=f"add {lacking}; `dav-bench list {lacking[2:]}s`"
        )
    return None
