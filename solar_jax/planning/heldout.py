"""Held-out rows of a config, on the mesh that the planner chooses for a model on the devices that are present."""

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.config import Config
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.training.measuring import HeldOut, open_heldout
from solar_jax.training.partition import everything


def planned_heldout(config: Config, c: Checkpoint, *, with_reference: bool = True) -> HeldOut:
    """Opens a config's held-out rows; arguments as in `open_heldout`.

    Raises:
      UserError: bad data, or a model that does not fit.
    """
    option, _ = search.choose(c.cfg, config, search.present(), everything(c.cfg))
    return open_heldout(option.config, c, make_mesh(option.config.mesh), with_reference=with_reference)
