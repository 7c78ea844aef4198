"""The training stages of a chain before anything runs: their steps, and the shapes of their models."""

import dataclasses
import pathlib

from solar_jax.chaining.stages import Chain, MergeStage, TrainStage
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import Config, ModelConfig
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.training.step_count import with_steps


@dataclasses.dataclass(frozen=True)
class Planned:
    """A training stage with the model that it starts from."""

    stage: TrainStage
    config: Config  # with its steps counted
    base: ModelConfig
    cfg: ModelConfig  # of its result


def planned_stages(chain: Chain, workdir: pathlib.Path) -> list[Planned]:
    """The training stages with their models' shapes, of which the first may have to be opened."""
    shapes: dict[str, ModelConfig] = {}
    found = []
    for stage in chain.stages:
        if isinstance(stage, MergeStage):
            continue
        config = stage.resolved(workdir)
        if stage.start:
            base = shapes[stage.start]
        else:
            base = config.model.architecture if config.model.num_hidden_layers else open_checkpoint(config.source).cfg
        cfg = shapes[stage.name] = grown_config(base, make_layer_map(base.num_hidden_layers, config.growth))
        found.append(Planned(stage, _counted(config, stage.tokens), base, cfg))
    return found


def _counted(config: Config, tokens: float) -> Config:
    """The config with steps in place of epochs, estimated from the tokens that the chain states."""
    return with_steps(config, max(1, round(tokens / config.data.sequence_length)))
