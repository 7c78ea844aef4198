"""Steps of a run that counts passes over its rows."""

import dataclasses
import math

from solar_jax.config import Config


def with_steps(config: Config, rows: int) -> Config:
    """The config with its steps counted, where it asks for passes over so many rows."""
    if config.train.steps:
        return config
    steps = max(1, math.ceil(config.train.epochs * rows / config.train.batch_size))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
