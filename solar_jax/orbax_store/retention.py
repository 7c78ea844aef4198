"""Checkpoint retention: keeps a run's newest checkpoints, one every so many steps, and the best."""

from collections.abc import Iterable, Mapping

from solar_jax.config import CheckpointConfig


def kept(steps: Iterable[int], cfg: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Returns the steps whose checkpoints are kept.

    Args:
      steps: steps of good checkpoints.
      cfg: the `keep` newest stay, multiples of `keep_every` steps, and the `keep_best` of lowest held-out loss.
      losses: held-out loss by step, in nats per token; a step without one is not among the best.
    """
    newest_first = sorted(steps, reverse=True)
    measured = sorted((losses[step], step) for step in newest_first if step in losses)
    return {
        *newest_first[: cfg.keep],
        *(step for step in newest_first if cfg.keep_every and step % cfg.keep_every == 0),
        *(step for _, step in measured[: cfg.keep_best]),
    }
