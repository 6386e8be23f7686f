"""One directory per run: everything in it is written atomically, so a reader never meets half a file.

    results/runs/<task>/<label>/<id>-s<seed>/
        spec.toml  run.json  env.json  metrics.parquet  samples.parquet  checkpoints/  events.jsonl  log.txt

A process that writes a run owns it through an advisory lock, which the kernel gives back however the
process ends. A run that says it is running while nobody owns it was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError
from dav_bench.files import (
    SCHEMA,
    DiskFull,
    check_schema,
    damaged,
    read_json,
    read_parquet,
    read_tensors,
    replacing,
    write_json,
    write_parquet,
    write_tensors,
    write_text,
)
from dav_bench.spec import IDENTITY_VERSION, RunSpec

if TYPE_CHECKING:
    import polars as pl
    import torch

STATUSES = ("running", "done", "failed", "oom", "timeout", "nan", "disk", "interrupted")
"""What run.json may say; readers derive "killed" from "running" without an owner."""

HEARTBEAT = 30.0
"""Seconds between two heartbeats."""

SILENCE = 10 * HEARTBEAT
"""Seconds without a heartbeat after which a run of another machine counts as dead."""

METRICS = {"round": "Int32", "cost": "Int64", "reward_rows": "Int64", "seconds": "Float64",
           "split": "String", "metric": "String", "value": "Float64", "n": "Int32"}  # fmt: skip
"""Columns of metrics.parquet and their polars types."""

_RESERVE = 1 << 16  # bytes set aside in each run, so that a full disk can still be recorded


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Busy(DavBenchError):
    """Another live process writes the run."""


class RunDir:
    """The directory of one run. `create` makes this process its owner; `open` only reads.

    Use it as a context manager, or call `close`, to give the run back at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None  # descriptor that holds the advisory lock; None for readers
        self._guard = threading.RLock()  # the heartbeat thread and the run both rewrite run.json
        self._stop = threading.Event()
        self._beaten = 0.0
        self._metrics: pl.DataFrame | None = None

    # -- ownership

    @classmethod
    def create(
        cls, root: Path | str, spec: RunSpec, label: str | None = None, *, fresh: bool = False
    ) -> RunDir:
        """Make or re-enter `<root>/runs/<task>/<label>/<id>-s<seed>` and own it; `root` is the results folder.

        A run that is done keeps its status (look at `.status` to reuse it); any other one is "running" again
        and goes on from `load_checkpoint`. `fresh` discards what an earlier run left.

        Raises:
            DavBenchError: another live process writes this run, or the folder belongs to another spec.
        """
        path = Path(root) / spec.dirname
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._own()
        try:
            if fresh:
                run._empty()
            if not (path / "run.json").exists():
                run._begin(spec, label or spec.label)
            else:
                run._resume(spec)
        except BaseException:
            run.close()
            raise
        _beat_regularly(run)
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """Read an existing run; refuses a newer schema and a folder without a readable run.json."""
        run = cls(Path(path))
        meta = run.meta
        check_schema(meta.get("schema"), run.path / "run.json")
        wrong = [key for key, right in _SHAPE.items() if not right(meta.get(key))]
        if wrong:
            raise damaged(run.path / "run.json", ValueError(f"it lacks or misstates {wrong[0]}"))
        return run

    @classmethod
    def bury(cls, path: Path | str, status: str, error: str) -> RunDir | None:
        """Record how a run ended whose process is gone and could not: `status`, unless it had said an end itself.

        None where there is no run, or another process goes on with it; "killed" needs no record.
        """
        try:
            run = cls.open(path)
            run._own()
        except DavBenchError:
            return None
        with run:
            if run.meta["status"] == "running" and status in STATUSES:
                run.update(status=status, error=error)
                run.log(f"{status}: {error}")
                run.event("run_finished", status=status, error=error)
        return run

    def close(self) -> None:
        """Stop the heartbeat and give the run back; harmless when repeated."""
        self._stop.set()
        with self._guard:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def _own(self) -> None:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        for patience in range(20, -1, -1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # a writer, or a reader that looks for one, which takes no time
                if not patience:
                    os.close(lock)
                    raise self._busy() from None
                time.sleep(0.02)
        self._lock = lock
        if (self.path / "run.json").exists() and self._alive_elsewhere():
            self.close()
            raise self._busy()

    def _busy(self) -> Busy:
        meta: dict[str, Any] = {}
        with suppress(DavBenchError):
            meta = self.meta
        return Busy(
            f"run {self.path.name} is being written by another process.",
            f"Process {meta.get('pid', '?')} on {meta.get('host', '?')} owns {self.path}.",
            "wait for it, stop it, or change a setting or the seed: that makes a run of its own",
        )

    def _alive_elsewhere(self) -> bool:
        """Whether another machine wrote lately (file locks do not reach across every network disk)."""
        with suppress(DavBenchError, OSError):
            meta = self.meta
            if meta.get("status") == "running" and meta.get("host") != socket.gethostname():
                return time.time() - (self.path / "run.json").stat().st_mtime < SILENCE
        return False

    def _empty(self) -> None:
        # run.json goes first: from then on the folder is a run that never began, whatever interrupts us.
        for entry in sorted(self.path.iterdir(), key=lambda p: (p.name != "run.json", p.name)):
            if entry.name == ".lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self._metrics = None

    def _begin(self, spec: RunSpec, label: str) -> None:
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self._set_aside()
        write_text(self.path / "spec.toml", spec.to_toml())
        now = _now()
        meta = {
            "schema": SCHEMA,
            "identity": {"version": IDENTITY_VERSION, "hash": spec.identity},
            "label": label,
        }
        meta |= {"task": spec.task, "seed": spec.seed, "status": "running", "error": None, "started": now}
        meta |= {"ended": None, "heartbeat": now, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.path / "run.json", meta | {"meter": {}, "peak_mb": None})

    def _resume(self, spec: RunSpec) -> None:
        meta = self.meta
        check_schema(meta.get("schema"), self.path / "run.json")
        held = meta.get("identity", {}).get("hash")
        if held != spec.identity:
            raise DavBenchError(
                f"{self.path} holds another run.",
                f"Its identity is {str(held)[:12]}, this one's is {spec.identity[:12]}.",
                "move the folder away, or repeat the command with --fresh",
            )
        self._sweep()
        if meta["status"] != "done":
            self._set_aside()
            self.update(status="running", error=None, ended=None, host=socket.gethostname(), pid=os.getpid())

    def _set_aside(self) -> None:
        with replacing(self.path / ".reserve") as temporary:
            temporary.write_bytes(os.urandom(_RESERVE))

    def _sweep(self) -> None:
        """Remove what a killed writer left: temporary files and checkpoints that nothing points to."""
        for folder in (self.path, self.path / "checkpoints"):
            for stray in folder.glob(".*.tmp"):
                stray.unlink(missing_ok=True)
        with suppress(DavBenchError):
            self._drop_checkpoints(keep=read_json(self.path / "checkpoints" / "last.json")["file"])

    # -- run.json

    @property
    def meta(self) -> dict[str, Any]:
        """run.json as it is on disk."""
        return read_json(self.path / "run.json")

    @property
    def status(self) -> str:
        """One of `STATUSES`, or "killed": it says running and nobody runs it."""
        status = str(self.meta.get("status"))
        return "killed" if status == "running" and not self.alive else status

    @property
    def alive(self) -> bool:
        """Whether a process owns this run now."""
        if self._lock is not None or self._alive_elsewhere():
            return True
        try:
            lock = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    def update(self, **fields: Any) -> None:
        """Change fields of run.json (status, error, meter, peak_mb, …); an end status also sets `ended`.

        On a full disk the space set aside at the start is used, so that the status can be recorded.
        """
        status = fields.get("status")
        if status is not None and status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
        with self._guard:
            if status is not None and status != "running":
                fields.setdefault("ended", _now())
            meta = {**self.meta, "heartbeat": _now(), **fields}
            try:
                write_json(self.path / "run.json", meta)
            except DiskFull:
                (self.path / ".reserve").unlink(missing_ok=True)
                write_json(self.path / "run.json", meta)
            self._beaten = time.monotonic()
            if status == "done":
                (self.path / ".reserve").unlink(missing_ok=True)

    def heartbeat(self) -> None:
        """Say that the run goes on (at most once a second; a thread also calls this every 30 s)."""
        with self._guard:
            if self._lock is not None and time.monotonic() - self._beaten > 1.0:
                self.update()

    # -- spec, environment, logs

    @property
    def spec(self) -> dict[str, Any]:
        """spec.toml for `RunSpec.from_dict`, checked against the identity of the run."""
        path = self.path / "spec.toml"
        try:
            spec = RunSpec.from_toml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, DavBenchError) as error:
            raise damaged(path, error) from error
        identity = self.meta["identity"]
        if identity["version"] == IDENTITY_VERSION and identity["hash"] != spec.identity:
            raise damaged(path, ValueError("its hash is not the identity of the run"))
        return spec.to_dict()

    @property
    def env(self) -> dict[str, Any]:
        """env.json, empty when there is none."""
        path = self.path / "env.json"
        return read_json(path) if path.exists() else {}

    def write_env(self, env: Mapping[str, Any]) -> None:
        """Record the environment (packages, device, dtype, threads, micro-batch, git, argv)."""
        write_json(self.path / "env.json", dict(env))

    def event(self, name: str, **data: Any) -> None:
        """Append one line to events.jsonl."""
        self._append("events.jsonl", json.dumps({"time": _now(), "event": name, **data}, default=str))

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of events.jsonl; a line torn by a kill is left out."""
        path = self.path / "events.jsonl"
        found: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def log(self, line: str) -> None:
        """Append one line to log.txt."""
        self._append("log.txt", f"{_now()}  {line}")

    def _append(self, name: str, line: str) -> None:
        # The log is no result: a full disk must not end the run here, the next real write says so.
        with self._guard, suppress(OSError), open(self.path / name, "ab+") as file:
            torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")

    # -- tables

    def append_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to metrics.parquet; each row has the keys of `METRICS`."""
        import polars as pl

        new = pl.DataFrame([{key: row[key] for key in METRICS} for row in rows], schema=_schema())
        with self._guard:
            frame = pl.concat([self.metrics(), new])
            write_parquet(self.path / "metrics.parquet", frame, {"identity": self._identity()})
            self._metrics = frame

    def rewind_metrics(self, round: int) -> None:
        """Drop rows after `round`: they were written after the checkpoint a resumed run starts from."""
        import polars as pl

        frame = self.metrics()
        kept = frame.filter(pl.col("round") <= round)
        if kept.height < frame.height:
            write_parquet(self.path / "metrics.parquet", kept, {"identity": self._identity()})
            self._metrics = kept

    def metrics(self) -> pl.DataFrame:
        """metrics.parquet, empty when nothing was recorded yet."""
        import polars as pl

        if self._lock is not None and self._metrics is not None:
            return self._metrics
        path = self.path / "metrics.parquet"
        if not path.exists():
            return pl.DataFrame(schema=_schema())
        return _checked(read_parquet(path), _schema(), path)

    def write_samples(self, columns: Mapping[str, Any]) -> None:
        """Write samples.parquet from columns of equal length: lists, arrays or tensors.

        `index` becomes i32, `noise_seed` i64, "reward.*" and "metric.*" f32, other columns keep their type.
        """
        import polars as pl

        series = [pl.Series(name, _plain(vals), dtype=_sample_type(name)) for name, vals in columns.items()]
        lengths = {s.name: s.len() for s in series}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of unequal length: {lengths}")
        write_parquet(self.path / "samples.parquet", pl.DataFrame(series), {"identity": self._identity()})

    def samples(self) -> pl.DataFrame:
        """samples.parquet."""
        path = self.path / "samples.parquet"
        return _checked(read_parquet(path), {"index": _sample_type("index")}, path)

    def _identity(self) -> str:
        return str(self.meta.get("identity", {}).get("hash", ""))

    # -- tensors

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
    ) -> None:
        """Save the state after `round`: a new tensor file, then one rename makes it the last checkpoint.

        `scalars` is any JSON value by name (floats survive exactly). A kill at any moment leaves the old
        checkpoint or the new one.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        name = f"last-{round:06d}.safetensors"
        if (folder / name).exists():  # never write over the file that last.json may point to
            name = f"last-{round:06d}-{time.time_ns()}.safetensors"
        write_tensors(folder / name, tensors)
        try:
            last = {"schema": SCHEMA, "round": round, "file": name, "scalars": dict(scalars)}
            write_json(folder / "last.json", last)
        except BaseException:
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
            raise
        self._drop_checkpoints(keep=name)

    def load_checkpoint(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last checkpoint as (round, tensors, scalars), or None when the run has none."""
        path = self.path / "checkpoints" / "last.json"
        if not path.exists():
            return None
        last = read_json(path)
        check_schema(last.get("schema"), path)
        return last["round"], read_tensors(path.with_name(last["file"])), last["scalars"]

    def drop_checkpoint(self) -> None:
        """Remove the last checkpoint (a finished run needs its final weights only)."""
        (self.path / "checkpoints" / "last.json").unlink(missing_ok=True)
        self._drop_checkpoints(keep="")

    def _drop_checkpoints(self, keep: str) -> None:
        for old in (self.path / "checkpoints").glob("last-*.safetensors"):
            if old.name != keep:
                old.unlink(missing_ok=True)

    def save_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write checkpoints/final.safetensors: the trainable weights of a finished run."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        write_tensors(self.path / "checkpoints" / "final.safetensors", tensors)

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The final trainable weights, on the CPU."""
        return read_tensors(self.path / "checkpoints" / "final.safetensors")


def _beat_regularly(run: RunDir) -> None:
    """Start the heartbeat thread; it holds the run weakly and ends with it."""
    stop, ref = run._stop, weakref.ref(run)

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            owner = ref()
            if owner is None:
                return
            with suppress(DavBenchError, OSError):  # the run itself meets the same trouble and reports it
                owner.heartbeat()
            del owner

    threading.Thread(target=beat, name="dav-bench heartbeat", daemon=True).start()


def _is_identity(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("version")) is int and isinstance(value.get("hash"), str)


def _is_meter(value: Any) -> bool:
    phases = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(p, dict) and all(type(n) in (int, float) for n in p.values()) for p in phases)


_SHAPE: Mapping[str, Callable[[Any], bool]] = {
    "identity": _is_identity,
    "label": lambda value: isinstance(value, str),
    "task": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
    "status": lambda value: value in STATUSES,
    "meter": _is_meter,
    "peak_mb": lambda value: value is None or type(value) in (int, float),
}
"""What readers rely on in run.json, whoever last edited it."""


def _checked(frame: pl.DataFrame, columns: Mapping[str, Any], path: Path) -> pl.DataFrame:
    """The table, if it has these columns: another one of ours in its place is readable and wrong."""
    wrong = [name for name, kind in columns.items() if frame.schema.get(name) != kind]
    if wrong:
        raise damaged(path, ValueError(f"it has no column {wrong[0]!r} of the right type"))
    return frame


def _schema() -> dict[str, Any]:
    import polars as pl

    return {name: getattr(pl, kind) for name, kind in METRICS.items()}


def _sample_type(name: str) -> Any:
    import polars as pl

    if name.startswith(("reward.", "metric.")):
        return pl.Float32
    return {"index": pl.Int32, "noise_seed": pl.Int64}.get(name)


def _plain(values: Any) -> Any:
    """A tensor or an array as something polars takes without torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return values if hasattr(values, "dtype") else list(values)
