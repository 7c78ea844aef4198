"""What a run records and shows: FLOPs and MFU, metrics files, the loss picture."""

import contextlib
import io
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.parallel import processes
from solar_jax.storage import paths
from solar_jax.storage.paths import is_local

_PUT_SECONDS = 30.0  # between two puts of a growing object


def flops_per_token(cfg: ModelConfig, sequence_length: int, *, causal: bool = True) -> float:
    """Model FLOPs of training on one token, forward and backward.

    A matmul costs 2 FLOPs a weight and token, and its backward pass twice its forward: 6 x the weights of all
    matmuls, the output projection included and the embedding look-up not. Scores and their product with the values
    add 2 x 2 x N x H x S forward. Causal, a query sees T / 2 keys on average (at most the sliding window); not
    causal, all T, as many publications count. Rematerialisation is not counted.
    """
    D, F, L, V = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.vocab_size
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    keys = sequence_length / 2 if causal else sequence_length
    if causal and cfg.sliding_window:
        keys = min(keys, cfg.sliding_window)
    weights = L * (D * H * (2 * N + 2 * K) + 3 * D * F) + D * V
    return 6 * weights + 3 * L * 4 * N * H * keys


def mfu(tokens_per_second: float, flops_a_token: float, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1: model FLOPs done over what the chips could do; None without a known peak."""
    return None if peak is None else tokens_per_second * flops_a_token / (peak * devices)


def memory_peaks() -> list[float] | None:
    """The most GiB of memory that each device of this process has held; None where a device does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] / 2**30 for s in stats if s and "peak_bytes_in_use" in s]
    return peaks if len(peaks) == len(stats) else None


class JsonLines:
    """A file of one JSON object a line, held in memory by every process and written by the first alone.

    On a disk each line is there as soon as it is appended. An object of a bucket cannot be appended to: it is put anew
    as a whole, now and then, and by `flush`. The processes have to append and drop the same.
    """

    def __init__(self, file: pathlib.Path):
        """Reads what is there, so that no process may be writing yet."""
        self.file = file
        self._writes, self._local = processes.is_first(), is_local(file)
        self._records, self._torn = self._stored()
        self._changed, self._put_at = False, time.monotonic()

    def _stored(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines of the file, and whether a crash cut the last one short."""
        text, records = paths.read(self.file) or "", []
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records, bool(text) and not text.endswith("\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines there are; one that a crash cut short is left out."""
        return list(self._records)

    def keep_if(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the other lines, as those of steps that a resumed run will take again."""
        self._records = [r for r in self._records if condition(r)]
        self._changed = True
        if self._local:
            self.flush()

    def append(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if not self._writes:
            return
        if not self._local:
            self._changed = True
            if time.monotonic() - self._put_at >= _PUT_SECONDS:
                with contextlib.suppress(UserError):  # the steps go on; `flush` tells of a bucket that stays away
                    self._put()
        elif self._torn:
            self._put()
        else:
            with open(self.file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Returns when every line is stored.

        Raises:
          UserError: the bucket does not take them.
        """
        if self._writes and self._changed:
            self._put()

    def _put(self) -> None:
        self._put_at = time.monotonic()  # of the try, so that a bucket that fails is not asked at every step
        paths.write(self.file, "".join(json.dumps(r) + "\n" for r in self._records))
        self._changed = self._torn = False


def read_json(file: pathlib.Path, missing: Any = None) -> Any:
    """`missing` where there is no such file."""
    text = paths.read(file)
    return missing if text is None else json.loads(text)


def write_json(file: pathlib.Path, value: Any) -> None:
    paths.write(file, json.dumps(value, indent=2) + "\n")


def duration(seconds: float) -> str:
    """E.g. "48 s", "3 min 20 s", "2 h 05 min", "3 d 04 h"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600:02d} h"


def plot_losses(
    file: pathlib.Path, title: str, base_loss: float, arms: dict[str, dict[str, list[tuple[int, float]]]]
) -> None:
    """The healing curve: training and held-out loss of each arm by step, against the base's line.

    Args:
      file: PNG to write.
      title: above the picture.
      base_loss: held-out, before growth.
      arms: name -> {"train": [(step, loss)], "heldout": [(step, loss)]}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    ax.axhline(base_loss, color="0.4", linestyle="--", linewidth=1.2, label=f"base, {base_loss:.3f}")
    for (name, curves), color in zip(arms.items(), ("C1", "C0"), strict=False):
        steps, losses = zip(*curves["heldout"], strict=True)
        label = f"{name}, held out: {losses[0]:.3f} to {losses[-1]:.3f}"
        ax.plot(steps, losses, "o-", color=color, label=label)
        if curves["train"]:
            faint = {"color": color, "alpha": 0.35, "linewidth": 1}
            ax.plot(*zip(*curves["train"], strict=True), label=f"{name}, training batches", **faint)
    ax.set(title=title, xlabel="step", ylabel="loss (nats a token)")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()  # since matplotlib writes to no bucket
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    paths.write(file, picture.getvalue())
