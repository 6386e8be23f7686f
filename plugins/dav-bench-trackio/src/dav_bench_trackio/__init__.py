"""Trackers for dav-bench: `--tracker trackio`, `tensorboard` or `wandb`. Their libraries load when a run begins."""

from dav_bench import hookimpl


@hookimpl
def register_trackers(register):
    at = "dav_bench_trackio.trackers:"
    register("trackio", at + "Trackio", summary="a local dashboard; its data lie in the results folder")
    register("tensorboard", at + "TensorBoard", summary="event files in each run's folder (extra: tensorboard)")
    register("wandb", at + "WandB", summary="Weights & Biases, online or WANDB_MODE=offline (extra: wandb)")
