"""The hooks a plugin may implement. Implementations may take fewer arguments than listed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from dav_bench import events

API_VERSION = 1
"""Major version of the plugin API; part of the name of the entry-point group."""

GROUP = f"dav_bench.v{API_VERSION}"
"""Entry-point group of plugins for this version."""

hookspec = pluggy.HookspecMarker("dav_bench")
hookimpl = pluggy.HookimplMarker("dav_bench")

Register = Callable[..., None]
"""Each register function checks its arguments at once; targets are callables or "module:attr" strings,
and strings stay unimported until the component is used. Config classes must import without torch."""


@hookspec
def register_methods(register: Register) -> None:
    """Add methods: `register(name, build, config=, requires=, tunes=, search=, summary=, paper=)`.

    `build(config) -> Method`. `tunes=True` says that the method trains the model; `search` names the
    searcher that is its E-step, which can then be applied at test time (`--search`).
    """


@hookspec
def register_models(register: Register) -> None:
    """Add models: `register(name, build, config=, provides=, domain=, summary=)`; `build(config, sampler) -> Model`."""


@hookspec
def register_rewards(register: Register) -> None:
    """Add rewards: `register(name, build, config=, provides=, domain=, summary=)`; `build(config) -> Reward`.

    A reward whose gradient may be used provides `"reward.grad"`.
    """


@hookspec
def register_searchers(register: Register) -> None:
    """Add searchers (E-steps): `register(name, build, config=, requires=, summary=)`; `build(config) -> Searcher`."""


@hookspec
def register_trainers(register: Register) -> None:
    """Add trainers (M-steps): `register(name, build, config=, requires=, summary=)`; `build(config) -> Loss`."""


@hookspec
def register_metrics(register: Register) -> None:
    """Add metrics: `register(name, fn, role=, better=, unit=, reduce=, domain=, summary=)`.

    `fn(samples, ctx)` gives one value per sample (`unit="sample"`, reduced by median or mean) or one
    for the set (`unit="set"`). Roles are quality, diversity and natural; better is up or down.
    """


@hookspec
def register_tasks(register: Register) -> None:
    """Add task folders: `register(path)` with the path of a `task.toml` or of its folder."""


@hookspec
def register_trackers(register: Register) -> None:
    """Add trackers: `register(name, build, config=, summary=)`; `build(config)` implements some of the life hooks."""


@hookspec
def register_launchers(register: Register) -> None:
    """Add launchers: `register(name, build, config=, summary=)`; reserved, the local launcher is built in."""


@hookspec
def register_commands(app: Any) -> None:
    """Add commands to the command line; `app` is a `typer.Typer`."""


@hookspec
def run_started(event: events.RunStarted) -> None:
    """Called once a run has its directory, before its model is built."""


@hookspec
def round_finished(event: events.RoundFinished) -> None:
    """Called after each training round, once it is saved."""


@hookspec
def samples_ready(event: events.SamplesReady) -> None:
    """Called when the final samples are drawn and scored."""


@hookspec
def run_finished(event: events.RunFinished) -> None:
    """Called last, whatever the status."""
