"""From a command to runs: methods x tasks x seeds, each new, cached, resumable, or skipped with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dav_bench.config import Layer, Resolved, resolve, settings_of
from dav_bench.errors import DavBenchError, near, problems
from dav_bench.known import board
from dav_bench.layers import FIXED, task_layers
from dav_bench.prompts import PromptSettings, resolved
from dav_bench.registry import Catalog, Entry, active
from dav_bench.spec import RunSpec
from dav_bench.tasks import TaskSpec, check_task

Status = Literal["new", "published", "cached", "resumable", "skip"]

UNTIL_SPENT = 1_000_000
"""Rounds of a training run that its budget ends."""

_INSTEAD = {"step.memoryless": "dav-bench run --method drakes --task {task}"}
"""What serves models without a capability: DRAKES follows reward gradients on tokens."""


@dataclass(frozen=True)
class Eval:
    """Protocol of evaluation, the same for every method."""

    samples: int = 256
    """Samples of the final evaluation; set metrics are comparable at equal numbers only."""
    seed: int = 20000
    """Seed of the evaluation noise."""
    every: int = 10
    """Rounds between evaluations while training."""


@dataclass(frozen=True)
class Budget:
    """What training may spend: it ends after the round that reaches it, or after the last round."""

    unit: Literal["cost", "reward", "seconds"] = "cost"
    """Network rows forward + 2 * backward, reward rows likewise, or seconds of search and fit (not reproducible)."""
    train: int | float | None = None
    """Most that training may spend; none leaves its end to the rounds."""


@dataclass(frozen=True)
class NES:
    """`--reward-wrap nes`: the gradient of a black-box reward by antithetic evolution strategies."""

    n: int = 16
    """Directions; each costs two rows of the reward for each sample."""
    sigma: float = 0.01
    """Size of a step along each, in the units of a sample (FAV: 0.005 on latents of images)."""


WRAPS: Mapping[str, type] = {"nes": NES}
"""What --reward-wrap may name, with its settings; they are a section of that name."""


@dataclass(frozen=True)
class Request:
    """What a command asks for."""

    methods: Sequence[str]
    """Names; empty with a pair."""
    tasks: Sequence[TaskSpec]
    """Tasks to run on."""
    seeds: Sequence[int] = (0,)
    """Training seeds."""
    layers: Sequence[Layer] = ()
    """Settings above the task file: config file, environment, --set."""
    preset: str | None = None
    """Preset of the task file."""
    search: str | None = "auto"
    """Searcher applied to tuned models at test time; "auto" is the method's own, None is none."""
    pair: tuple[str, str] | None = None
    """Searcher and trainer that make a method without code."""
    reward: str | None = None
    """Training reward instead of the task's: a name, or `path.py:function`."""
    wrap: str | None = None
    """One of WRAPS: gives the training reward a gradient, for the methods that follow it."""
    heldout: bool = True
    """Read the held-out reward; tuning does not."""
    baselines: bool = True
    """Add the task's baselines."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    spec: RunSpec
    """What is run."""
    task: TaskSpec
    """The task it belongs to."""
    status: Status
    """new | published (in the committed board, not here) | cached | resumable | skip."""
    path: Path
    """Its run directory, whether it exists or not."""
    reason: str = ""
    """Why it is skipped, or what an earlier process left."""
    fix: str = ""
    """What would make a skipped run possible."""
    base: RunSpec | None = None
    """The training run that a test-time search builds on."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting comes from, by `section.key`."""


def plan(
    request: Request, catalog: Catalog, out: Path = Path("results"), fresh: bool = False
) -> list[PlannedRun]:
    """All runs of a request in the order of execution: baselines, methods, each before the search built on it.

    Args:
        request: What the command asks for.
        catalog: Everything registered.
        out: Results folder, which says what is finished or can be resumed.
        fresh: Treat everything as new.
    """
    runs: dict[str, PlannedRun] = {}
    errors: list[str] = []
    if request.wrap is not None and request.wrap not in WRAPS:
        raise DavBenchError(f"--reward-wrap {request.wrap}: unknown name{near(request.wrap, WRAPS)}")
    used: set[tuple[str, str, str]] = set()
    for task in request.tasks:
        check_task(task, catalog)
        composer = _Composer(request, task, catalog)
        for entry in _entries(request, task, catalog):
            for run in composer.runs(entry, out, fresh):
                runs.setdefault(run.spec.identity, run)
        errors += composer.errors
        used |= composer.used
    errors += _unused(request, catalog, used)
    if request.wrap and not any("wrap" in run.spec.rewards["train"] for run in runs.values()):
        errors.append(f"--reward-wrap {request.wrap}: no method of this command follows the reward's gradient")
    if errors:
        method = next(iter(request.methods), "METHOD")
        fix = f"dav-bench show {method} --task {request.tasks[0].name}"
        raise problems("some settings cannot be used.", list(dict.fromkeys(errors)), fix)
    return list(runs.values())


def _entries(request: Request, task: TaskSpec, catalog: Catalog) -> list[Entry]:
    names = list(task.baselines) if request.baselines else []
    names += [m for m in request.methods if m not in names]
    entries = [catalog.get("methods", name) for name in names]
    if request.pair:
        searcher, trainer = (
            catalog.get(kind, name)
            for kind, name in zip(("searchers", "trainers"), request.pair, strict=True)
        )
        requires = tuple(sorted({*searcher.requires, *trainer.requires}))
        pair = "_".join(request.pair)
        entries.append(
            Entry(
                "methods", pair, "pair", requires=requires, tunes=True, search=searcher.name, origin="--pair"
            )
        )
    return entries


def _unused(request: Request, catalog: Catalog, used: set[tuple[str, str, str]]) -> list[str]:
    """Settings that reached no field: a misspelt section, or a method that is not part of the command."""
    out = []
    methods = catalog.names("methods")
    here = {*request.methods, *(b for t in request.tasks if request.baselines for b in t.baselines)}
    for layer in request.layers:
        for section, values in layer.sections.items():
            known = section.split(".")[0] in FIXED or section in methods
            for key in values:
                if (layer.source, section, key) in used:
                    continue
                name = f"{section}.{key} ({layer.source})"
                if not known:
                    out.append(f"{name}: unknown section{near(section, [*FIXED, *here])}")
                elif section == "method":
                    fields = _fields_of(here, catalog)
                    out.append(f"{name}: no method of this command has it{near(key, fields)}")
                elif layer.strict and section in methods and section not in here:
                    out.append(f"{name}: {section!r} is not part of this command")
                elif layer.strict and section in FIXED:
                    out.append(f"{name}: nothing in this command has it")
    return out


def _fields_of(methods: Iterable[str], catalog: Catalog) -> set[str]:
    configs = [e.config for m in methods if (e := catalog.find("methods", m)) is not None]
    return {name for config in configs if config for name in settings_of(config)}


class _Composer:
    """Makes the runs of one task."""

    def __init__(self, request: Request, task: TaskSpec, catalog: Catalog):
        self.request, self.task, self.catalog = request, task, catalog
        self.layers = [*task_layers(task, request.preset), *request.layers]
        self.errors: list[str] = []
        self.used: set[tuple[str, str, str]] = set()
        self.sources: dict[str, str] = {}
        self.model, self.model_values = self._component("models", "model", task.model["use"])
        self.domain = self.model.domain
        self.sampler = self._section(_sampler_class(task), "sampler")
        self.eval = self._section(Eval, "eval")
        self.budget = self._budget()
        self.prompts = self._prompts()
        self.rewards = {role: self._reward(role) for role in self._roles()}
        self.wrap = None if request.wrap is None else self._section(WRAPS[request.wrap], request.wrap)

    def _roles(self) -> list[str]:
        return [r for r in self.task.rewards if r == "train" or self.request.heldout]

    def _note(self, found: Resolved, section: str) -> dict[str, Any]:
        self.errors += found.errors
        self.used |= found.used
        self.sources |= {f"{section}.{key}": source for key, source in found.sources.items()}
        return found.values

    def _section(self, cls: type | None, section: str) -> dict[str, Any]:
        return self._note(resolve(cls, self.layers, [section], getattr(self, "domain", None)), section)

    def _budget(self) -> dict[str, Any]:
        held = {k: v for k, v in self._section(Budget, "budget").items() if v is not None}
        train, unit, source = held.get("train"), held.get("unit"), self.sources.get("budget.train")
        if train is not None and not 0 < train < float("inf"):
            self.errors.append(f"budget.train ({source}): must be above 0 and finite, got {train}")
        elif train is not None and unit != "seconds" and train != int(train):
            self.errors.append(f"budget.train ({source}): {unit} is counted in whole rows, got {train}")
        return held

    def _prompts(self) -> dict[str, Any]:
        values = self._section(PromptSettings, "prompts")
        if "prompts" not in self.model.provides:
            if any(values[key] for key in ("train", "eval")):
                self.errors.append(f"prompts: model {self.model.name!r} reads no text")
            return {}
        sources = {k.partition(".")[2]: v for k, v in self.sources.items() if k.startswith("prompts.")}
        try:
            return resolved(values, sources, self.task.folder)
        except DavBenchError as err:
            self.errors.append(" ".join(filter(None, (err.what, err.why))))
            return {}

    def _component(self, kind: str, section: str, use: str) -> tuple[Entry, dict[str, Any]]:
        """Entry and settings of a component chosen by `use` in its section."""
        source = "task file"
        layers = []
        for layer in self.layers:
            values = dict(layer.sections.get(section, {}))
            if "use" in values:
                use, source = values.pop("use"), layer.source
                self.used.add((layer.source, section, "use"))
            layers.append(Layer(layer.source, {section: values}))
        entry = self.catalog.get(kind, use)
        values = self._note(resolve(entry.config, layers, [section]), section)
        self.sources[f"{section}.use"] = source
        return entry, {"use": use, **values}

    def _reward(self, role: str) -> dict[str, Any]:
        section, use = f"reward.{role}", self.task.rewards[role]["use"]
        if role == "train" and self.request.reward:
            from dav_bench.build import inspect_reward, is_file_reward

            use = self.request.reward
            self.sources[f"{section}.use"] = "--reward"
            if is_file_reward(use):
                digest, text = inspect_reward(use)
                return {"use": use, "sha256": digest, "text": text}
            return {
                "use": use,
                **self._note(resolve(self.catalog.get("rewards", use).config, [], []), section),
            }
        return self._component("rewards", section, use)[1]

    def runs(self, entry: Entry, root: Path, fresh: bool) -> list[PlannedRun]:
        """The runs of one method: each seed, and test-time search on it where it tunes the model."""
        kept, self.sources = self.sources, dict(self.sources)
        params = self._params(entry)
        search = self._search(entry, params)
        out = []
        for seed in self.request.seeds if entry.seeded else self.request.seeds[:1]:
            spec = RunSpec(
                task=self.task.name,
                task_version=self.task.version,
                task_hash=self.task.hash,
                method=entry.name,
                params=params,
                model=self.model_values,
                sampler=self.sampler,
                rewards=self._wrapped(entry, params, search),
                prompts=self.prompts,
                eval=self.eval,
                budget=self.budget if trains(entry) else {"unit": Budget.unit},
                heldout=self.request.heldout and "heldout" in self.rewards,
                seed=seed if entry.seeded else 0,
            )
            out.append(self._planned(spec, entry, params, root, fresh))
            if search is not None:
                tuned = RunSpec(**{**spec.to_dict(), "search": search})
                out.append(self._planned(tuned, entry, params, root, fresh))
        self.sources = kept
        return out

    def _wrapped(self, *part: Any) -> dict[str, Any]:
        """The rewards of a method, the training reward wrapped where the method or its search needs a gradient."""
        used = any("reward.grad" in active(e.requires, values) for e, values in self._parts(*part))
        if self.wrap is None or not used:
            return self.rewards
        train = {**self.rewards["train"], "wrap": {"name": self.request.wrap, **self.wrap}}
        return {**self.rewards, "train": train}

    def _parts(
        self, entry: Entry, params: Mapping[str, Any], search: Mapping[str, Any] | None
    ) -> list[tuple[Entry, Mapping[str, Any]]]:
        """What makes a run, each with its settings: the method, and the searcher at test time."""
        parts: list[tuple[Entry, Mapping[str, Any]]] = [(entry, _flat_params(params))]
        if search:
            parts.append((self.catalog.get("searchers", search["name"]), search["params"]))
        return parts

    def _params(self, entry: Entry) -> dict[str, Any]:
        if entry.target != "pair":
            found = resolve(entry.config, self.layers, ["method", entry.name], self.domain, loose=["method"])
            values = self._note(found, "method")
            if entry.config is not None and not found.errors:
                try:  # settings that are right each and wrong together
                    entry.config(**values)
                except ValueError as err:
                    self.errors.append(f"{entry.name}: {err}")
                    return values
            complete = getattr(entry.config, "complete", None)
            if complete is not None and not found.errors:  # what else decides the run: the files it reads
                values = complete(values)
            return self._until_spent(values, "method.rounds")
        from dav_bench.core.method import Training

        out: dict[str, Any] = {}
        for kind, section, name in zip(
            ("searchers", "trainers"), ("searcher", "trainer"), self.request.pair or (), strict=True
        ):
            config = self.catalog.get(kind, name).config
            out[section] = {"name": name, "params": self._section(config, section)}
        sections = ["method", "training"]
        found = resolve(Training, self.layers, sections, self.domain, loose=["method"])
        return {**out, "training": self._until_spent(self._note(found, "training"), "training.rounds")}

    def _until_spent(self, values: dict[str, Any], key: str) -> dict[str, Any]:
        """A command that sets a budget and no rounds lets the budget alone end training."""
        task = ("default", "task file", f"preset {self.request.preset}")
        source = self.sources.get("budget.train", "default")
        if "rounds" not in values or source in task or self.sources.get(key, "default") not in task:
            return values
        self.sources[key] = source
        return {**values, "rounds": UNTIL_SPENT}

    def _search(self, entry: Entry, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """Test-time search on a tuned model: settings it shares with the method start from the method's.

        `search.x` is for whichever searcher is used, `search.tree.x` for that one.
        """
        if not entry.tunes or self.request.search is None:
            return None
        name = entry.search if self.request.search == "auto" else self.request.search
        if name is None:
            return None
        searcher = self.catalog.get("searchers", name)
        layers = [Layer(entry.name, {"search": searcher.shared(params)})]
        layers += [self._of_searcher(layer, name) for layer in self.layers]
        found = resolve(searcher.config, layers, ["search"], self.domain)
        return {"name": name, "params": self._note(found, "search")}

    def _of_searcher(self, layer: Layer, name: str) -> Layer:
        """A layer with what it says of one searcher alone."""
        general: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in layer.sections.get("search", {}).items():
            head, _, rest = key.partition(".")
            if not rest or head not in self.catalog.names("searchers"):
                general[key] = value
                continue
            self.used.add((layer.source, "search", key))
            if head == name:
                own[rest] = value
        return Layer(layer.source, {"search": general | own}, layer.strict)

    def _planned(
        self, spec: RunSpec, entry: Entry, params: Mapping[str, Any], out: Path, fresh: bool
    ) -> PlannedRun:
        path = out / spec.dirname
        base = spec.base() if spec.search else None
        reason, fix = self._misfit(spec, entry, params)
        status: Status = "skip"
        if not reason:
            status, reason = state(spec, out, fresh)
        return PlannedRun(spec, self.task, status, path, reason, fix, base, self.sources)

    def _misfit(self, spec: RunSpec, entry: Entry, params: Mapping[str, Any]) -> tuple[str, str]:
        """Why this run is impossible, and what would work; two empty strings when it is possible."""
        needs = self._parts(entry, params, spec.search)
        given = active(self.model.provides, {**self.sampler, **self.model_values})
        train = spec.rewards["train"]
        if "wrap" in train and self.domain == "sequence":
            return (
                f"{self.request.wrap} follows the reward between samples, and between two tokens there are none",
                f"dav-bench list methods --fits {self.task.name}",
            )
        for role, reward in self.rewards.items():
            known = self.catalog.find("rewards", reward["use"])
            if known and known.domain and self.domain and known.domain != self.domain:
                return (
                    f"{role} reward {known.name!r} scores {known.domain}, "
                    f"model {self.model.name!r} makes {self.domain}",
                    "dav-bench list rewards",
                )
        given |= _reward_gives(train, self.catalog)
        if "prompts" in given and not self.prompts:
            why = f"model {self.model.name!r} draws what a text asks for, and there are no prompts"
            return why, "--set prompts.train=tiger,owl"
        for part, values in needs:
            missing = sorted(active(part.requires, values) - given)
            if missing:
                switch = _switch(self.model, missing[0], self.sampler)
                names = (train["use"], self.model.name, self.task.name)
                return _explain(part, missing, values, *names, given, self.domain, switch)
            if part.domain and self.domain and part.domain != self.domain:
                return (
                    f"{part.name!r} works on {part.domain}, model {self.model.name!r} makes {self.domain}",
                    f"dav-bench list methods --fits {self.task.name}",
                )
        return "", ""


def trains(entry: Entry) -> bool:
    """Whether a method has anything to train: the model, or a value that its search uses."""
    from dav_bench.core.method import Training

    return entry.tunes or (entry.config is not None and issubclass(entry.config, Training))


def fits(entry: Entry, task: TaskSpec, catalog: Catalog) -> tuple[str, str]:
    """Why a method cannot run on a task with its default settings, and the way out; empty where it can."""
    try:
        (run, *_) = plan(
            Request([entry.name], [task], baselines=False, search=None), catalog, Path("no-results"), True
        )
    except DavBenchError as err:
        return " ".join([err.what, *(err.why or "").split()]), err.fix or ""
    return run.reason, run.fix


def _sampler_class(task: TaskSpec) -> type:
    """A config class with the task's sampler keys: which exist depends on its process."""
    numbers = {"steps": int, "eta": float, "guidance": float}
    values = {"steps": 64, **task.sampler}
    return make_dataclass(
        "Sampler", [(k, numbers.get(k, type(v)), field(default=v)) for k, v in values.items()], frozen=True
    )


def _flat_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name; for a pair, those of both parts."""
    if "searcher" not in params or "trainer" not in params:
        return dict(params)
    return {**params["searcher"]["params"], **params["trainer"]["params"]}


def _reward_gives(reward: Mapping[str, Any], catalog: Catalog) -> set[str]:
    wrapped = {"reward.grad"} if "wrap" in reward else set()
    if "sha256" in reward:
        return wrapped if reward["text"] else {"reward.grad"}
    return wrapped | active(catalog.get("rewards", reward["use"]).provides, reward)


def _switch(model: Entry, capability: str, sampler: Mapping[str, Any]) -> tuple[str, str]:
    """The sampler setting that keeps a model from a capability it has at another value, and that value, as
    `key=value` both: eta, for densities.  Empty where there is none."""
    for give in model.provides:
        name, _, test = give.partition(" if ")
        key, unequal, value = test.partition("!=") if "!=" in test else test.partition("=")
        if name == capability and key in sampler and unequal:
            held = f"{sampler[key]:g}" if isinstance(sampler[key], float) else sampler[key]
            return f"{key}={held}", f"{key}={1 if unequal == '!=' else value}"
    return "", ""


def _choices(part: Entry, key: str) -> list[str]:
    """Values that a setting of a part may take, where they are named."""
    setting = settings_of(part.config).get(key) if part.config else None
    return [str(value) for value in get_args(setting.type)] if setting else []


def _explain(
    part: Entry,
    missing: list[str],
    values: Mapping[str, Any],
    reward: str,
    model: str,
    task: str,
    given: set[str],
    domain: str | None,
    switch: tuple[str, str] = ("", ""),
) -> tuple[str, str]:
    lacking = "reward " + repr(reward) if missing[0].startswith("reward.") else "model " + repr(model)
    why = f"{part.name!r} needs {', '.join(missing)}; {lacking} does not give it"
    if all(switch):
        return f"{why} with sampler.{switch[0]}", f"--set sampler.{switch[1]}"
    section = "search" if part.kind == "searchers" else part.name
    for need in part.requires:
        name, _, test = need.partition(" if ")
        if name != missing[0] or not test:
            continue
        if "=" not in test and isinstance(values.get(test), bool):
            return why, f"--set {section}.{test}=false"
        key = test.partition("=")[0]
        for other in _choices(part, key):
            lacks = sorted(active(part.requires, {**values, key: other}) - given)
            if all(lack.startswith("reward.") for lack in lacks):
                which = f", with a reward that gives {', '.join(lacks)}" if lacks else ""
                return why, f"--set {section}.{key}={other}{which}"
    if missing == ["reward.grad"] and domain != "sequence":
        return why, "--reward-wrap nes"
    instead = (_INSTEAD[name] for name in missing if name in _INSTEAD)
    return why, next(instead, "dav-bench list methods --fits {task}").format(task=task)


def state(spec: RunSpec, out: Path, fresh: bool) -> tuple[Status, str]:
    """What there is of a run: in its directory, or else in the committed board, which holds its identity."""
    status, reason = on_disk(out / spec.dirname, fresh)
    if (status, reason) != ("new", "") or fresh:
        return status, reason
    held = board(out, spec.task)
    return ("published", "") if spec.identity in held.runs else ("new", held.problem)


def on_disk(path: Path, fresh: bool) -> tuple[Status, str]:
    """What an earlier process left in the run directory."""
    if fresh or not (path / "run.json").exists():
        return "new", ""
    from dav_bench.store import RunDir

    try:
        run = RunDir.open(path)
        held = run.status
    except DavBenchError as err:
        return "new", f"the folder is damaged: {err.what}"
    if held == "done":
        return "cached", ""
    if held == "running":
        return "skip", "another process is writing it"
    if (path / "checkpoints" / "last.json").exists():
        return "resumable", held
    return "new", f"the last attempt ended: {held}"
