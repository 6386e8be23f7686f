"""What is installed: `list`, `show`, `plugins` and `env`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from dav_bench.cli import complete, render
from dav_bench.errors import DavBenchError, ExitCode, near
from dav_bench.plugins import BLOCK, catalog, plugins
from dav_bench.registry import KINDS, Entry, active
from dav_bench.suites import all_suites
from dav_bench.tasks import TaskSpec, all_tasks, find_task

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _plugins() -> None:
    """List plugins, the broken ones with the reason."""


@app.command("list")
def list_plugins(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Every plugin found: working, broken or blocked."""
    here = plugins()
    rows = [
        {"plugin": p.name, "status": "ok", "from": p.dist or p.target, "import_s": round(p.seconds, 3),
         "note": _adds(p.name)}
        for p in here.loaded
    ]  # fmt: skip
    rows += [
        {"plugin": b.name, "status": "broken", "from": b.dist or b.target, "import_s": None, "note": _why(b)}
        for b in here.broken
    ]
    rows += [
        {"plugin": n, "status": "blocked", "from": "", "import_s": None, "note": ""} for n in here.blocked
    ]
    if json:
        render.emit_json(rows)
    else:
        render.table(("plugin", "status", "from", "import s", "note"), [list(r.values()) for r in rows])


def _why(broken: Any) -> str:
    return f"{broken.reason} ({broken.where})" if broken.where else broken.reason


def _adds(name: str) -> str:
    counts = {k: sum(e.origin == name for e in catalog().all(k)) for k in KINDS}
    return ", ".join(f"{n} {k if n > 1 else k[:-1]}" for k, n in counts.items() if n)


@app.command("show")
def show_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin.", autocompletion=complete.plugin)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One plugin: what it registers and which hooks it implements."""
    here = plugins()
    found: dict[str, Any] = {}
    for loaded in here.loaded:
        if loaded.name == name:
            found = {"plugin": name, "status": "ok", "module": loaded.target, "distribution": loaded.dist,
                     "hooks": list(loaded.hooks)}  # fmt: skip
            found |= {
                k: names for k in KINDS if (names := [e.name for e in catalog().all(k) if e.origin == name])
            }
    for bad in (b for b in here.broken if b.name == name):
        found = {"plugin": name, "status": "broken", "module": bad.target, "distribution": bad.dist,
                 "reason": bad.reason, "where": bad.where}  # fmt: skip
    if not found:
        known = [*(p.name for p in here.loaded), *(p.name for p in here.broken)]
        raise DavBenchError(f"no plugin is called {name!r}{near(name, known)}", fix="dav-bench plugins list")
    if json:
        render.emit_json(found)
    else:
        render.table(
            ("", ""), [(k, ", ".join(v) if isinstance(v, list) else v) for k, v in found.items() if v]
        )


@app.command("new")
def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin, such as codon-usage.")],
    kind: Annotated[
        str,
        typer.Option(
            help="reward, model, method, searcher, trainer, metric, task or tracker.",
            autocompletion=complete.one_of(
                "reward", "model", "method", "searcher", "trainer", "metric", "task", "tracker"
            ),
        ),
    ],
    into: Annotated[Path, typer.Option(help="Folder to make it in.")] = Path(),
    author: Annotated[str, typer.Option(help="Who the licence names.")] = "",
) -> None:
    """Start a plugin: a distribution with code, tests, README, licence and CI, which works as it stands."""
    from dav_bench.templates import new

    folder, *files = new(name, kind, into, author)
    for path in files:
        typer.echo(str(path))
    typer.echo(f"\nNext: pip install -e '{folder}[dev]' && pytest {folder}")


@app.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(help="Name of the plugin.", autocompletion=complete.plugin)],
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of the check.")] = 600.0,
    memory_gb: Annotated[float, typer.Option(min=1, help="Limit of its address space in GB.")] = 32.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what a plugin promises, in a process of its own: a checklist with fixes."""
    from dav_bench.testing.apart import examine_apart

    here = plugins()
    known = [*(p.name for p in here.loaded), *(b.name for b in here.broken)]
    if name not in known:
        fix = f"{BLOCK} leaves it out" if name in here.blocked else "dav-bench plugins list"
        raise DavBenchError(f"no plugin is called {name!r}{near(name, known)}", fix=fix)
    checks = examine_apart(name, seconds, memory_gb)
    failed = [c for c in checks if c.status == "failed"]
    if json:
        render.emit_json([c.to_dict() for c in checks])
    else:
        marks = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}
        render.table(("", "check", "note"), [(marks[c.status], c.name, c.note) for c in checks])
        for c in failed:
            typer.echo(f"\n{c.name}: {c.note}\n  Try: {c.fix}" if c.fix else f"\n{c.name}: {c.note}")
        counts = {status: sum(c.status == status for c in checks) for status in ("ok", "failed", "skipped")}
        typer.echo("\n" + ", ".join(f"{n} {status}" for status, n in counts.items()))
    raise typer.Exit(ExitCode.RUN_FAILED if failed else ExitCode.OK)


@app.command("doctor")
def doctor(
    out: Annotated[Path, typer.Option(help="Results folder whose runs are looked at.")] = Path("results"),
    build: Annotated[
        bool, typer.Option("--build", help="Build the model and rewards of every task: finds missing weights.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is wrong here and how to mend it: plugins, requirements, tasks, torch, runs."""
    from dav_bench.doctor import diagnose, header

    found = diagnose(out, build)
    if json:
        render.emit_json([f.to_dict() for f in found])
    else:
        typer.echo(header())
        for f in found:
            typer.echo(f"{f.status:<8} {f.area}: {f.what}" + (f"\n         Try: {f.fix}" if f.fix else ""))
    bad = any(f.status == "problem" for f in found)
    raise typer.Exit(ExitCode.RUN_FAILED if bad else ExitCode.OK)


LISTED = ("methods", "tasks", "suites", "models", "rewards", "searchers", "trainers", "metrics")


def list_components(
    kind: Annotated[str, typer.Argument(help="|".join(LISTED))],
    fits: Annotated[
        str | None, typer.Option(help="Say what works on this task, and why the rest does not.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List methods, tasks, models, rewards or metrics."""
    if kind not in LISTED:
        raise DavBenchError(f"there are no {kind!r}{near(kind, LISTED)}", fix="dav-bench list methods")
    render.notice()
    if kind == "tasks":
        rows = [_task_row(t) for _, t in sorted(all_tasks().found.items())]
        rows += [
            {"name": str(path), "title": f"broken: {' '.join(why.split())}", "model": "", "reward": "", "from": ""}
            for path, why in all_tasks().broken.items()
        ]  # fmt: skip
    elif kind == "suites":
        rows = [
            {"name": s.name, "title": s.title, "tasks": ", ".join(s.tasks), "from": s.origin}
            for s in all_suites().values()
        ]
    else:
        rows = [_row(e) for e in catalog().all(kind)]
        if fits:
            task = find_task(fits)
            rows = [_fit(row, *misfit(e, task)) for row, e in zip(rows, catalog().all(kind), strict=True)]
    if json:
        render.emit_json(rows)
        return
    if not rows:
        typer.echo(f"no {kind}")
        return
    fitting = fits and kind not in ("tasks", "suites")
    shown = ("name", "fits", "why not", "try", "summary") if fitting else tuple(rows[0])
    render.table(shown, [[_cell(row[k]) for k in shown] for row in rows])


def _row(entry: Entry) -> dict[str, Any]:
    """A component for `list`."""
    row = {"name": entry.name, "summary": entry.summary}
    if entry.kind in ("models", "rewards"):
        row["gives"] = ", ".join(entry.provides)
    elif entry.kind != "metrics":
        row["needs"] = ", ".join(entry.requires)
    if entry.kind in ("methods", "models"):
        row["paper"] = entry.paper
    return row | {"domain": entry.domain or "any", "from": entry.origin}


def _fit(row: dict[str, Any], reason: str, fix: str) -> dict[str, Any]:
    way_out = "" if fix.startswith("dav-bench list") else fix  # this is that list
    return row | {"fits": not reason, "why not": reason, "try": way_out}


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _task_row(task: TaskSpec) -> dict[str, Any]:
    return {"name": task.name, "title": task.title, "model": task.model["use"],
            "reward": ", ".join(r["use"] for r in task.rewards.values()), "from": task.origin}  # fmt: skip


def misfit(entry: Entry, task: TaskSpec) -> tuple[str, str]:
    """Why a component cannot be used on a task with its default settings, and a way out; empty when it can."""
    known = catalog()
    model = known.find("models", task.model["use"])
    if model is None:
        return f"model {task.model['use']!r} is not installed", ""
    if entry.domain and model.domain and entry.domain != model.domain:
        return f"works on {entry.domain}, the task's model makes {model.domain}", ""
    if entry.kind == "methods":
        from dav_bench.plan import fits

        return fits(entry, task, known)
    if entry.kind in ("searchers", "trainers"):
        reward = known.find("rewards", task.rewards["train"]["use"])
        given = {*model.provides, *(reward.provides if reward else ())}
        defaults = vars(entry.settings()) if entry.config else {}
        lacking = sorted(active(entry.requires, defaults) - given)
        return (f"needs {', '.join(lacking)}" if lacking else ""), ""
    return "", ""


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a method, task, model, reward, metric, ...", autocompletion=complete.anything
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Show the values that hold on this task.", autocompletion=complete.task),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the task file.")] = None,
    config: Annotated[str | None, typer.Option(help="TOML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a component: settings, their sources, needs."""
    render.notice()
    entries = [e for e in catalog().anywhere(name) if e.kind != "tasks"]
    found = [describe(e, task, preset, config, set_ or []) for e in entries]
    if name in all_tasks().found:
        found.append(describe_task(find_task(name)))
    if not found:
        known = [*(e.name for e in catalog()), *all_tasks().found]
        raise DavBenchError(f"nothing is called {name!r}{near(name, known)}", fix="dav-bench list methods")
    if json:
        render.emit_json(found)
        return
    for one in found:
        settings = one.pop("settings", [])
        typer.echo(f"{one.pop('kind')} {one.pop('name')}")
        for key, value in one.items():
            if value:
                between = "\n            " if key == "not on" else ", "
                typer.echo(f"  {key:<9} {between.join(value) if isinstance(value, (list, tuple)) else value}")
        if settings:
            typer.echo("")
            columns = ("setting", "value", "from", "type", "what it is")
            render.table(columns, [list(s.values()) for s in settings])


def describe(
    entry: Entry, task: str | None, preset: str | None, config: str | None, sets: Sequence[str]
) -> dict[str, Any]:
    """A component for `show`."""
    tasks = [find_task(task)] if task else list(all_tasks().found.values())
    fits = (
        {t.name: misfit(entry, t) for t in tasks}
        if entry.kind in ("methods", "searchers", "trainers")
        else {}
    )
    return {
        "kind": entry.kind[:-1],
        "name": entry.name,
        "summary": entry.summary,
        "needs": list(entry.requires),
        "gives": list(entry.provides),
        "domain": entry.domain,
        "paper": entry.paper,
        **(_nature(entry) if entry.kind == "methods" else {}),
        **(_scale(entry) if entry.kind == "rewards" else {}),
        "fits": [name for name, (why, _) in fits.items() if not why],
        "not on": [
            f"{name} ({why}{'; try ' + fix if fix else ''})" for name, (why, fix) in fits.items() if why
        ],
        "origin": f"{entry.origin}, {_target(entry)}",
        "settings": _settings(entry, task, preset, config, sets),
    }


def _nature(entry: Entry) -> dict[str, str]:
    from dav_bench.plan import trains

    return {"trains": "yes" if trains(entry) else "no", "search": entry.search or ""}


def _scale(entry: Entry) -> dict[str, str]:
    """Range and unit of a reward whose class states them."""
    try:
        target = entry.load()
    except DavBenchError:
        return {}
    kind = getattr(target, "__self__", target)  # `Aesthetic.load` is bound to its class
    found = {"unit": unit} if isinstance(unit := getattr(kind, "unit", None), str) else {}
    if isinstance(bounds := getattr(kind, "range", None), tuple):
        found["range"] = "{:g} to {:g}".format(*bounds)
    return found


def _target(entry: Entry) -> str:
    if callable(entry.target):
        return f"{entry.target.__module__}:{getattr(entry.target, '__qualname__', '?')}"
    return str(entry.target)


def _settings(
    entry: Entry, task: str | None, preset: str | None, config: str | None, sets: Sequence[str]
) -> list[dict[str, Any]]:
    from dav_bench.config import docs_of, settings_of, type_name

    if entry.config is None:
        return []
    fields, docs = settings_of(entry.config), docs_of(entry.config)
    values: Mapping[str, Any] = {k: s.default for k, s in fields.items()}
    sources: Mapping[str, str] = {}
    if entry.kind == "methods" and (task or sets or config):
        from dav_bench.cli.run import planned

        if task is None:
            raise DavBenchError("settings hold on a task.", fix="add --task dna")
        path = Path(config) if config else None
        run = planned(
            methods=[entry.name], tasks=[task], sets=sets, config=path, preset=preset, baselines=False
        )[0]
        values, sources = run.spec.params, run.sources
    return [
        {"setting": k, "value": values.get(k), "from": sources.get(f"method.{k}", "default"),
         "type": type_name(s.type), "doc": docs.get(k, "")}
        for k, s in fields.items()
    ]  # fmt: skip


def describe_task(task: TaskSpec) -> dict[str, Any]:
    """A task for `show`."""
    return {
        "kind": "task",
        "name": task.name,
        "title": task.title,
        "summary": task.summary,
        "version": f"{task.version} ({task.hash})",
        "model": task.model["use"],
        "rewards": [f"{role} {r['use']}" for role, r in task.rewards.items()],
        "metrics": [m for names in task.metrics.values() for m in names],
        "sampler": [f"{k} {v}" for k, v in task.sampler.items()],
        "eval": [f"{k} {v}" for k, v in task.eval.items()],
        "presets": list(task.presets),
        "methods": [e.name for e in catalog().all("methods") if not misfit(e, task)[0]],
        "paper": task.paper,
        "origin": f"{task.origin}, {task.folder}",
    }


def env(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions and hardware, to paste into a report."""
    from dav_bench.env import environment, report

    with suppress(ImportError):
        import torch  # noqa: F401 (what it sees of a GPU is part of the report)
    if json:
        render.emit_json(environment())
    else:
        typer.echo(report())
