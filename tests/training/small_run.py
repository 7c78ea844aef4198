"""A small training run for tests: its config, weights and batches."""

import dataclasses
import functools

import jax
import numpy as np

from solar_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from solar_jax.model.shapes import Params, param_shapes
from tests.parallel.test_rules import SMALL

STEPS, ROWS, LENGTH = 3, 8, 16
LEARNING_RATE = 1e-2
# LLVM may leave the CPU's code as it is, which halves the time; XLA partitions and schedules the same program.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def config(
    accumulation: int = 1, remat: str = "full", precision: str = "float32", attention: str = "auto", *,
    rows: int = ROWS, length: int = LENGTH,
) -> Config:  # fmt: skip
    return Config(
        data=DataConfig(sequence_length=length),
        train=TrainConfig(
            steps=STEPS, batch_size=rows, accumulation=accumulation, remat=remat, precision=precision,
            attention=attention,
        ),
        # A rate that moves the loss, so that a wrong update shows in the next step's. Adam divides a gradient by its
        # own size plus eps: with a tiny eps, rounding in a gradient near 0 would decide which way its weight goes.
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", clip_norm=1.0, eps=1e-3),
    )  # fmt: skip


def model(tied: bool) -> ModelConfig:
    return dataclasses.replace(SMALL, tie_word_embeddings=tied)


@functools.cache
def initial(tied: bool) -> Params:
    """Random weights on the host, norm scales near one."""
    rng = np.random.default_rng(0)

    def one(path, s):
        x = 0.2 * rng.standard_normal(s.shape) + path[-1].key.endswith("norm")
        return x.astype(np.float32)

    return jax.tree.map_with_path(one, param_shapes(model(tied)))


def make_batch(
    step: int, vocab_size: int = SMALL.vocab_size, *, rows: int = ROWS, length: int = LENGTH
) -> dict[str, np.ndarray]:
    """Rows of two documents, with weights so uneven that a mean of the rows' means is not the mean."""
    rng = np.random.default_rng(100 + step)
    tokens = rng.integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    place, border = np.arange(length)[None], rng.integers(4, length - 4, (rows, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(place < border, place, place - border).astype(np.int32),
        "segment_ids": (place >= border).astype(np.int32),
        "weights": (rng.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32),
    }
