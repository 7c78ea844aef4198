"""A tiny model in both implementations, a batch, and its programs on one device and on four: made once."""

import functools

import jax
import numpy as np
import torch
import transformers

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import MeshConfig, TrainConfig
from solar_jax.data.pipeline import heldout_batches
from solar_jax.inspecting.statistics import Statistics
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.training.layer_run import LayerRunner
from tests.conftest import TINY, hf_model, save_hf

LAYERS, ROWS, LENGTH = TINY["num_hidden_layers"], 3, 16


@functools.cache
def tokens() -> np.ndarray:
    """[ROWS, LENGTH + 1]: inputs, and one further on targets."""
    return np.random.default_rng(0).integers(3, TINY["vocab_size"], (ROWS, LENGTH + 1)).astype(np.int32)


def rows() -> list[dict[str, np.ndarray]]:
    found = []
    for row in tokens():
        positions = np.arange(LENGTH, dtype=np.int32)
        weights = (positions != 5).astype(np.float32)  # one target does not count
        found.append(
            {"tokens": row[:-1], "targets": row[1:], "positions": positions, "segment_ids": 0 * positions,
             "weights": weights}
        )  # fmt: skip
    return found


@functools.cache
def reference() -> transformers.PreTrainedModel:
    return hf_model()


class Ready:
    """The model on a mesh of so many devices."""

    def __init__(self, folder, devices: int):
        c = open_checkpoint(str(folder))
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        self.params = load_params(c, rules.parameter_shardings(c.cfg, mesh))
        size = rules.padded_rows(ROWS, mesh)
        self.batch = heldout_batches(rows(), size, rules.batch_sharding(mesh))[0]
        self.runner = LayerRunner(c.cfg, TrainConfig(precision="float32"), LENGTH, mesh)
        self.statistics = Statistics(self.runner)
        self.stream = self.statistics.stream(self.params, self.batch)


_ready: dict[int, Ready] = {}


def ready(tmp_path_factory, devices: int = 1) -> Ready:
    if devices not in _ready:
        _ready[devices] = Ready(save_hf(reference(), tmp_path_factory.mktemp("inspected") / "model"), devices)
    return _ready[devices]


def torch_losses(model: transformers.PreTrainedModel, order: list[int]) -> np.ndarray:
    """Each row's mean loss of a transformers model whose layers are these, in this order."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[i] for i in order)
    model.config.num_hidden_layers = len(order)
    try:
        with torch.no_grad():
            return row_losses(model(inputs(), use_cache=False).logits).numpy()
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


def inputs() -> torch.Tensor:
    return torch.tensor(tokens()[:, :-1]).long()


def targets() -> torch.Tensor:
    return torch.tensor(tokens()[:, 1:]).long()


def weights() -> torch.Tensor:
    return torch.tensor(np.stack([row["weights"] for row in rows()]))


def row_losses(logits: torch.Tensor) -> torch.Tensor:
    """Each row's mean over the targets that count, [ROWS]."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets(), reduction="none")
    return (losses * weights()).sum(-1) / weights().sum(-1)
