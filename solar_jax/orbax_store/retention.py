"""Which checkpoints of a run are kept: the newest, one every so many steps, and the best."""

from collections.abc import Iterable, Mapping

from solar_jax.config import CheckpointConfig


def kept(steps: Iterable[int], cfg: CheckpointConfig, losses: Mapping[int, float]) -> set[int]:
    """Of the steps with a good checkpoint those that stay.

    Args:
      steps: of good checkpoints.
      cfg: `keep` newest stay; those at multiples of `keep_every` steps; and the `keep_best` of least held-out loss.
      losses: held-out loss by step, in nats a token; a checkpoint of a step without one is not among the best.
    """
    newest_first = sorted(steps, reverse=True)
    measured = sorted((losses[step], step) for step in newest_first if step in losses)
    return {
        *newest_first[: cfg.keep],
        *(step for step in newest_first if cfg.keep_every and step % cfg.keep_every == 0),
        *(step for _, step in measured[: cfg.keep_best]),
    }
