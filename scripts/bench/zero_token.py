"""Measures the held-out loss of growth operators before any training, on the demo's rows.

    uv run --extra demo python scripts/bench/zero_token.py [OPERATOR,KEY=VALUE,... ...]

Without arguments, the rows of the table in docs/growing.md. The model and the rows are those of
configs/dus_48l.py:smollm2.
"""

import dataclasses
import sys

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.cli.config_files import load_config
from solar_jax.config import GrowthConfig
from solar_jax.config_tree import typed
from solar_jax.growth.operators import OPERATOR_KEYS, make_layer_map
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.training.measuring import open_heldout
from solar_jax.training.partition import everything

ROWS = (
    "identity", "dus,m=6", "blocks,blocks=2:20", "blocks,blocks=2:12;12:20", "midas,b=6", "lidas,b=6", "stack_last,b=6",
    "gated,of=dus,m=6,beta=0.25", "gated,of=dus,m=6,beta=0.5", "split,a=6,b=24", "split_sqrt,a=6,b=24",
    "linear_lesa,every=5", "average,every=5", "zeroed,m=6,inner=normal",
)  # fmt: skip


def growth_of(text: str) -> GrowthConfig:
    """Reads OPERATOR,KEY=VALUE,...; `;` stands for the comma between blocks."""
    operator, *pairs = text.split(",")
    values: dict[str, object] = {"operator": operator}
    for key, _, value in (pair.partition("=") for pair in pairs):
        kind = type(getattr(GrowthConfig(), key))
        values[key] = kind(value.replace(";", ","))
    assert set(values) <= {"operator", *OPERATOR_KEYS}
    return typed(GrowthConfig, values, "growth")


def main() -> None:
    config = load_config("dus_48l:smollm2")
    c = open_checkpoint(config.source)
    option, _ = search.choose(c.cfg, config, search.present(), everything(c.cfg))
    config = dataclasses.replace(config, mesh=option.config.mesh)
    heldout = open_heldout(config, c, make_mesh(config.mesh))
    for text in sys.argv[1:] or ROWS:
        layer_map = make_layer_map(c.cfg.num_hidden_layers, growth_of(text))
        loss = heldout.of(grown(c, layer_map))["loss"]
        print(f"{layer_map.operator:<40}{layer_map.layers:>4} layers {loss:>8.4f}", flush=True)


if __name__ == "__main__":
    main()
