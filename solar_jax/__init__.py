"""SOLAR 10.7B's Depth Up-Scaling in JAX and Flax; for a notebook, the names below. Nothing slow is imported until used.

import solar_jax as sj
c = sj.open_checkpoint("smollm2")
deeper = sj.grown(c, sj.make_layer_map(c.cfg.num_hidden_layers, sj.GrowthConfig("dus", m=6)))
logits = sj.logits(deeper.cfg, sj.load_params(deeper), tokens)
sj.convert_checkpoint(deeper, sj.Target(pathlib.Path("deeper")), "notebook")
sj.train.run(sj.load_config("dus_48l:smollm2", {"train.steps": 2}), pathlib.Path("runs/short"))
"""

import importlib
from typing import Any

_MODULES = {
    "open_checkpoint": "checkpoints.open",
    "grown": "checkpoints.views",
    "cast": "checkpoints.views",
    "load_params": "checkpoints.load",
    "load_tokenizer": "checkpoints.tokenizer",
    "Target": "checkpoints.convert",
    "convert_checkpoint": "checkpoints.convert",
    "GrowthConfig": "config",
    "make_layer_map": "growth.operators",
    "picture": "growth.picture",
    "parameter_count": "model.shapes",
    "logits": "model.llama",
    "hidden": "model.llama",
    "next_token_loss": "training.objectives",
    "load_config": "cli.config_files",
    "from_params": "checkpoints.checkpoint",
    "load_model": "decoding.model",
    "Request": "decoding.engine",
    "push": "checkpoints.push",
    "path": "storage.paths",
    "run_command": "cli.notebook",
    "show_picture": "cli.notebook",
    "use_folder": "cli.notebook",
    "check_kernel": "cli.notebook",
}
__all__ = [*_MODULES, "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # the command's module, with `run`
        return importlib.import_module("solar_jax.train")
    if name not in _MODULES:
        raise AttributeError(f"module 'solar_jax' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return getattr(importlib.import_module(f"solar_jax.{_MODULES[name]}"), name)
