"""From a specification to the objects that run: the one place where lazy entries are imported."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.plugins import catalog

if TYPE_CHECKING:
    from dav_bench.core import MeteredReward, Method, Model, Reward, Searcher
    from dav_bench.spec import RunSpec


def build_model(spec: RunSpec) -> Model:
    """The generator of a run, pretrained."""
    params = dict(spec.model)
    return catalog().get("models", params.pop("use")).build(params, spec.sampler)


def build_reward(spec: RunSpec, role: str) -> Reward:
    """The reward of one role, `train` or `heldout`."""
    params = {key: value for key, value in spec.rewards[role].items() if key != "wrap"}
    use = params.pop("use")
    if is_file_reward(use):
        return file_reward(use, params.get("sha256", ""), catalog().get("models", spec.model["use"]).domain)
    return catalog().get("rewards", use).build(params)


def wrap_reward(spec: RunSpec, role: str, reward: MeteredReward) -> Callable[..., Any]:
    """The reward with the gradient that `--reward-wrap` gives it, whose calls are counted; else the reward itself."""
    wrap = dict(spec.rewards[role].get("wrap", {}))
    if not wrap:
        return reward
    from dav_bench.core.nes import NES

    wrap.pop("name")
    return NES(reward, **wrap)


def build_method(spec: RunSpec) -> Method:
    """The method of a run; a pair made on the command line carries its two parts in `params`."""
    if "searcher" in spec.params and "trainer" in spec.params:
        from dav_bench.config import make
        from dav_bench.core.method import Method, Training

        schedule = make(Training, spec.params.get("training", {}), "training")
        searcher, trainer = _part("searchers", spec.params["searcher"]), _part("trainers", spec.params["trainer"])
        return Method(searcher, trainer, schedule)
    return catalog().get("methods", spec.method).build(spec.params)


def build_search(spec: RunSpec) -> Searcher:
    """The searcher applied at test time to the tuned model of `spec.base()`."""
    if spec.search is None:
        raise ValueError("this run has no test-time search")
    return catalog().get("searchers", spec.search["name"]).build(spec.search.get("params", {}))


def search_settings(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """A searcher for test time as `RunSpec.search` holds it: what it shares with a method is as the method has it."""
    from dav_bench.spec import plain

    entry = catalog().get("searchers", name)
    config = entry.settings(entry.shared(params))
    return {"name": name, "params": plain(config) if config is not None else {}}


def _part(kind: str, value: Mapping[str, Any]) -> Any:
    return catalog().get(kind, value["name"]).build(value.get("params", {}))


# ---- rewards from a file


def is_file_reward(use: str) -> bool:
    """Whether a reward is given as `path.py:function` rather than by name."""
    return ".py:" in use


def inspect_reward(use: str) -> tuple[str, bool]:
    """sha256 of the file of a reward, and whether its function reads text; nothing is executed.

    A function whose first parameter is called `sequences` gets a list of strings and has no gradient;
    any other gets the samples as a tensor and the conditions: `fn(sample, cond)`.
    """
    import ast

    path, _, name = use.rpartition(":")
    try:
        source = Path(path).read_bytes()
        tree = ast.parse(source)
    except OSError as err:
        raise DavBenchError(
            f"the reward {use!r} cannot be read.", str(err), "--reward ./my.py:fn", code=ExitCode.MISSING
        ) from err
    except (SyntaxError, ValueError) as err:
        raise DavBenchError(f"the reward {use!r} is not valid Python.", str(err)) from err
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = [*node.args.posonlyargs, *node.args.args]
            return hashlib.sha256(source).hexdigest()[:16], bool(first) and first[0].arg == "sequences"
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    raise DavBenchError(f"{path} defines no function {name!r}.", f"It defines {', '.join(names) or 'none'}.")


def file_reward(use: str, sha256: str = "", domain: str | None = None) -> Reward:
    """Load `path.py:function` as a reward; a file that changed since the run was planned is refused."""
    digest, text = inspect_reward(use)
    if sha256 and digest != sha256:
        raise DavBenchError(
            f"the reward {use!r} changed since this run was planned.",
            f"Its content hash is {digest}, the run's is {sha256}.",
            "plan a new run with `dav-bench run`, or put the old file back",
        )
    path, _, name = use.rpartition(":")
    module_name = f"dav_bench_reward_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise DavBenchError(f"the reward {use!r} cannot be loaded.")
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from dav_bench.builtin.rewards.function import FunctionReward

    return FunctionReward(getattr(module, name), domain or "sequence", text, name)
