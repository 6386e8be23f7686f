"""The command line: commands load when they run, so that `dav-bench --help` is instant."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from dav_bench.errors import DavBenchError, ExitCode, near

COMMANDS = {
    "run": ("dav_bench.cli.run:run", "Run methods on tasks, or reuse what is finished."),
    "sample": (
        "dav_bench.cli.sample:sample",
        "Draw more samples from a finished run and write them with their training reward, best first.",
    ),
    "leaderboard": ("dav_bench.cli.results:leaderboard", "Show, publish or check the leaderboard of a task."),
    "compare": (
        "dav_bench.cli.compare:compare",
        "Compare two rows seed by seed: difference, interval, p, and the sentence a paper could use.",
    ),
    "results": ("dav_bench.cli.results:app", "List and show runs."),
    "report": (
        "dav_bench.cli.report:report",
        "Write the boards, charts, samples and runs as a website that opens from disk.",
    ),
    "plot": ("dav_bench.cli.plot:app", "Draw pictures of runs and boards."),
    "list": ("dav_bench.cli.plugins:list_components", "List methods, tasks, models, rewards or metrics."),
    "show": ("dav_bench.cli.plugins:show", "Show a component: settings, their sources, needs."),
    "verify": ("dav_bench.cli.verify:verify", "Check each method against the law it should reach."),
    "plugins": ("dav_bench.cli.plugins:app", "List plugins, the broken ones with the reason."),
    "env": ("dav_bench.cli.plugins:env", "Print versions and hardware, to paste into a report."),
}
"""Name to ("module:attr", first line of its help); a test compares the lines with the real ones."""


class LazyGroup(TyperGroup):
    """Help shows the static lines above; a command's module is imported when it runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Used for the help of the whole program: a stub."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1], callback=lambda: None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Used to run a command: the real one, built in or from a plugin."""
        name = args[0]
        command = load(name) if name in COMMANDS else plugin_command(name)
        if command is None:
            ctx.fail(f"No such command '{name}'{near(name, COMMANDS)}")
        return name, command, args[1:]


def load(name: str) -> Any:
    """Import one of the built-in commands."""
    module, _, attr = COMMANDS[name][0].partition(":")
    target = getattr(importlib.import_module(module), attr)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name)(function)
    return get_command(target)


def plugin_command(name: str) -> Any:
    """A command that a plugin registered, or None."""
    from dav_bench.plugins import plugins

    extra = typer.Typer(add_completion=False)
    extra.callback()(lambda: None)
    plugins().commands(extra)
    group: Any = get_command(extra)
    return group.commands.get(name)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double its time
    pretty_exceptions_enable=False,
    help="Align diffusion models to rewards, and measure what it gains and what it costs.",
    epilog="Plugins may add commands: dav-bench plugins list",
)


def _version(value: bool) -> None:
    if value:
        from dav_bench import __version__

        typer.echo(f"dav-bench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    strict_plugins: Annotated[
        bool, typer.Option("--strict-plugins", help="Fail where a plugin is broken.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if strict_plugins:
        from dav_bench import plugins

        plugins.reset(strict=True)


def main() -> None:
    """Entry point: errors in three lines, exit codes as in `ExitCode`."""
    try:
        app(prog_name="dav-bench")
    except DavBenchError as err:
        if os.environ.get("DAV_BENCH_TRACEBACK"):
            traceback.print_exc()
        else:
            complain(err)
        sys.exit(err.code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as err:
        if os.environ.get("DAV_BENCH_TRACEBACK"):
            raise
        frame = traceback.extract_tb(err.__traceback__)[-1]
        where = f"in {os.path.basename(frame.filename)} line {frame.lineno}: {err}"
        hint = "DAV_BENCH_TRACEBACK=1 shows the traceback; `dav-bench env` goes well with a report"
        complain(DavBenchError(f"unexpected {type(err).__name__}.", where, hint))
        sys.exit(ExitCode.RUN_FAILED)


def complain(err: DavBenchError) -> None:
    """Print an error as what, why and fix."""
    print(f"Error: {err}", file=sys.stderr)
