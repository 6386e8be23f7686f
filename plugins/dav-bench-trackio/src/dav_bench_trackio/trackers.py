"""What a run tells, told to a dashboard: settings when it begins, numbers of each round, final metrics and status."""

import contextlib
import math
import os
import sys
from importlib.util import find_spec

from dav_bench import DavBenchError, ExitCode


class Tracker:
    """The life of one run; a subclass knows a library."""

    library = ""
    extra = ""

    def __init__(self):
        if self.library not in sys.modules and find_spec(self.library) is None:
            package = f"dav-bench-trackio[{self.extra}]" if self.extra else "dav-bench-trackio"
            raise DavBenchError(
                f"the tracker {type(self).__name__} needs {self.library}.",
                "It is not installed.",
                f"pip install '{package}'",
                code=ExitCode.MISSING,
            )
        self.run = None
        self.round = 0

    def run_started(self, event):
        self.round = event.resumed
        with quiet():
            self.run = self.open(event)

    def round_finished(self, event):
        if self.run is not None:
            self.round = event.round
            self.log(finite({**event.metrics, "cost": event.cost, "seconds": event.seconds}), event.round)

    def run_finished(self, event):
        if self.run is None:
            return
        run_metrics = finite({f"final/{name}": value for name, value in event.metrics.items()})
        with quiet():
            if run_metrics:
                self.log(run_metrics, self.round)
            self.close(event.status)
        self.run = None

    # ---- what a library does
    def open(self, event):
        raise NotImplementedError

    def log(self, numbers, step):
        self.run.log(numbers, step=step)

    def close(self, status):
        self.run.finish()


def quiet():
    """Libraries that greet do so on stderr: stdout may be read by a program (`--json`)."""
    return contextlib.redirect_stdout(sys.stderr)


def finite(numbers):
    """Dashboards draw numbers; what is NaN or infinite is left out (the run's own tables keep it)."""
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def name_of(event):
    """Method and folder of the run: `dav 1a2b3c4d-s0`."""
    return f"{event.label or event.spec.method} {event.run_dir.name}"


class Trackio(Tracker):
    """A project for each task; data in `trackio` in the results folder, or where TRACKIO_DIR says."""

    library = "trackio"

    def open(self, event):
        results = event.run_dir.resolve().parents[3]  # results/runs/<task>/<label>/<run>
        os.environ.setdefault("TRACKIO_DIR", str(results / "trackio"))
        import trackio

        return trackio.init(
            project=f"dav-bench-{event.spec.task}",
            name=name_of(event),
            group=event.label or event.spec.method,
            config=event.spec.to_dict(),
            resume="allow" if event.resumed else "never",
            embed=False,
        )

    def close(self, status):
        import trackio

        trackio.finish()  # the run's own `finish` would be called again, and heard, when the program ends


class TensorBoard(Tracker):
    """Event files in the folder `tensorboard` of the run."""

    library = "tensorboard"
    extra = "tensorboard"

    def open(self, event):
        import json

        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(event.run_dir / "tensorboard"))
        writer.add_text("spec", f"```json\n{json.dumps(event.spec.to_dict(), indent=1, default=str)}\n```")
        return writer

    def log(self, numbers, step):
        for name, value in numbers.items():
            self.run.add_scalar(name, value, step)

    def close(self, status):
        self.run.add_text("status", status)
        self.run.close()


class WandB(Tracker):
    """A project for each task; a resumed run goes on in the same place."""

    library = "wandb"
    extra = "wandb"

    def open(self, event):
        import wandb

        return wandb.init(
            project=f"dav-bench-{event.spec.task}",
            name=name_of(event),
            group=event.label or event.spec.method,
            id=event.run_dir.name,
            config=event.spec.to_dict(),
            dir=str(event.run_dir),
            resume="allow",
        )

    def close(self, status):
        self.run.finish(exit_code=0 if status == "done" else 1)
