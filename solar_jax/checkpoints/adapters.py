"""Low-rank adapters as views of a checkpoint: those of our own runs, and PEFT's folders, read and written.

PEFT's `layer_replication` builds a deeper model from its base by repeating ranges of layers, which is growth by copies:
an adapter of a grown model is then an adapter of the base, some MB in place of the model.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.tensor_table import TENSORS
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig, LoraConfig
from solar_jax.errors import UserError
from solar_jax.formats import safetensors
from solar_jax.growth.operators import LayerMap, make_layer_map, slices
from solar_jax.model.lora import scale
from solar_jax.storage.json_files import read_json_object

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN = "adapter.json"  # in the model folder of a run whose checkpoints hold adapters
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")


@dataclasses.dataclass(frozen=True)
class Low:
    """The adapter of one tensor W [out, in]: W + B A, scaled by row to DoRA's magnitude where there is one."""

    a: np.ndarray  # [R, in] float32
    b: np.ndarray  # [out, R] float32, with the scale
    magnitude: np.ndarray | None = None  # [out] float32

    @functools.cached_property
    def key(self) -> str:
        """A hash of its arrays."""
        parts = [x.tobytes() for x in (self.a, self.b, self.magnitude) if x is not None]
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def adapted(c: Checkpoint, lows: Mapping[str, Low]) -> Checkpoint:
    """`c` with adapters applied: computed in float32 as it is read, rounded once to each tensor's dtype.

    Args:
      c: the model that the adapter was trained on.
      lows: by HF name of the tensor.

    Raises:
      UserError: the model has no such tensor, or it has another shape.
    """
    for name, low in lows.items():
        expected = (low.b.shape[0], low.a.shape[1])
        if c.shape_of.get(name) != expected:
            raise UserError(
                f"{c.where}: an adapter of another base: it has {name} of shape {list(expected)}, the base "
                f"{list(c.shape_of[name]) if name in c.shape_of else 'no such tensor'}."
            )

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        x = c.read(name, rows)
        if (low := lows.get(name)) is None:
            return x
        wide = x.astype(np.float32) + low.b[rows] @ low.a
        if low.magnitude is not None:
            wide *= (low.magnitude[rows] / np.linalg.norm(wide, axis=1))[:, None]
        return wide.astype(x.dtype)

    origins = {name: (c.origin(name), lows[name].key) if name in lows else c.origin(name) for name in c.shape_of}
    return dataclasses.replace(
        c,
        read=read,
        entry_of={name: entry for name, entry in c.entry_of.items() if name not in lows},
        origins=origins,
        view=None,
    )


# ---- PEFT's folders --------------------------------------------------------------------------------------------------
# Keys of adapter_config.json that change the maths -> the values that stand for "not used"
_UNUSED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is


def is_peft(path: pathlib.Path) -> bool:
    """Returns whether a folder holds an adapter and no model."""
    return (path / PEFT_CONFIG).is_file() and not (path / "config.json").exists()


def open_peft(folder: pathlib.Path, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """The base of a PEFT adapter, grown as `layer_replication` says, with the adapter applied.

    Raises:
      UserError: it is an adapter of another kind, of another base, or damaged.
    """
    file = folder / PEFT_CONFIG
    config = read_json_object(file)
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise UserError(f"{file}: base_model_name_or_path must name a model, found {base_name!r}.")
    if (pathlib.Path(base_name).expanduser() / PEFT_CONFIG).exists():
        raise UserError(f"{file}: its base {base_name} must be a model, found another adapter.")
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{file}: peft_type must be LORA, found {kind!r}.")
    for key, unused in _UNUSED.items():
        if config.get(key) not in unused:
            raise UserError(f"{file}: {key}={config[key]!r} is not supported; merge that adapter with PEFT first.")
    if (start := config.get("init_lora_weights")) not in _STARTS:
        raise UserError(
            f"{file}: init_lora_weights={start!r} changes the base too; merge that adapter with PEFT first."
        )
    base = open_base(base_name)
    if ranges := config.get("layer_replication"):
        text = ",".join(f"{a}:{b}" for a, b in ranges)
        base = grown(base, slices(base.cfg.num_hidden_layers, GrowthConfig(operator="slices", slices=text)))
    lows = _read_weights(folder, config)
    print(f"{folder} is an adapter of {len(lows)} tensors: applied to its base {base_name}")
    return adapted(dataclasses.replace(base, files=(*base.files, folder / PEFT_WEIGHTS)), lows)


def _read_weights(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Low]:
    weights = folder / PEFT_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; {PEFT_CONFIG} is there.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{folder / PEFT_CONFIG}: r and lora_alpha must be numbers, found {rank!r} and {alpha!r}.")
    factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in safetensors.read_header(weights).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{weights}: {name} is not a tensor of a LoRA adapter.")
        parts.setdefault(f"{match[1]}.weight", {})[match[2]] = safetensors.read_tensor(name, entry).astype(np.float32)
    lows = {}
    for name, found in parts.items():
        shapes = {part: list(x.shape) for part, x in found.items()}
        if [shapes.get("lora_A", [])[:1], shapes.get("lora_B", [])[1:]] != [[rank], [rank]]:
            raise UserError(f"{weights}: {name} needs lora_A [{rank}, in] and lora_B [out, {rank}], found {shapes}.")
        if config.get("use_dora", False) != ("lora_magnitude_vector" in found):
            raise UserError(f"{weights}: {name}: use_dora is {config.get('use_dora')}, found {sorted(found)}.")
        magnitude = found.get("lora_magnitude_vector")
        lows[name] = Low(
            found["lora_A"], factor * found["lora_B"], None if magnitude is None else magnitude.reshape(-1)
        )
    return lows


def write_peft(
    folder: pathlib.Path, lows: Mapping[str, Low], lora: LoraConfig, layers: list[int], base: str,
    replication: list[list[int]] | None = None,
) -> None:  # fmt: skip
    """Writes adapters as a PEFT folder, into a folder that does not have its final name yet.

    Args:
      folder: receives adapter_config.json and adapter_model.safetensors.
      lows: by HF name of the tensor.
      lora: how they were trained.
      layers: which have one.
      base: `base_model_name_or_path`.
      replication: ranges of the base's layers that make the model; None if it is the base.
    """
    factor, tensors = scale(lora), {}
    for name, low in lows.items():
        stem = _PREFIX + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = low.a
        tensors[f"{stem}.lora_B.weight"] = low.b / np.float32(factor)
        if low.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = low.magnitude
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.variant == "rslora",
        "use_dora": lora.variant == "dora",
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "layers_to_transform": layers,
        "layers_pattern": "layers",
        "layer_replication": replication,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    pieces = [
        safetensors.Piece(name, x.shape, np.dtype(np.float32), functools.partial(lambda x: [x], x))
        for name, x in tensors.items()
    ]
    safetensors.write_safetensors(folder / PEFT_WEIGHTS, pieces)


def replication_of(layer_map: LayerMap) -> list[list[int]] | None:
    """The layer ranges of a model grown by plain copies, as PEFT's `layer_replication`; None for the base itself."""
    if layer_map.is_identity:
        return None
    return [[layer_map.source[a], layer_map.source[b - 1] + 1] for a, b in layer_map.runs()]


# ---- Our own runs ----------------------------------------------------------------------------------------------------
def own_record(lora: LoraConfig, source: str, growth: GrowthConfig, layers: list[int]) -> dict[str, Any]:
    """The content of adapter.json: what a run's adapters are adapters of."""
    return {
        "lora": dataclasses.asdict(lora), "source": source, "growth": dataclasses.asdict(growth), "layers": layers,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OwnAdapter:
    """The adapter of a run."""

    lora: LoraConfig
    source: str  # the model before growth
    growth: GrowthConfig
    layers: list[int]  # which have one

    @classmethod
    def read(cls, file: pathlib.Path) -> "OwnAdapter":
        """Reads adapter.json.

        Raises:
          UserError: it is damaged.
        """
        found = read_json_object(file)
        try:
            lora = LoraConfig(**found["lora"] | {"targets": tuple(found["lora"]["targets"])})
            return cls(lora, found["source"], GrowthConfig(**found["growth"]), found["layers"])
        except (KeyError, TypeError) as e:
            raise UserError(f"{file}: is damaged: {e}.") from e

    def base(self, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
        """The model that was adapted."""
        c = open_base(self.source)
        return grown(c, make_layer_map(c.cfg.num_hidden_layers, self.growth))


def lows_of(leaves: Mapping[str, np.ndarray], lora: LoraConfig, layers: list[int]) -> dict[str, Low]:
    """The adapters by HF name, from the stacked arrays of `model.lora` [layers, ...]."""
    found = {}
    for target in lora.targets:
        a, b = (np.asarray(leaves[f"{target}_lora_{part}"], np.float32) for part in "ab")
        norm = leaves.get(f"{target}_lora_norm")
        for i, layer in enumerate(layers):
            name = TENSORS[f"layers/{target}_proj"].hf.format(layer)
            found[name] = Low(
                a[i].reshape(-1, lora.rank).T,
                scale(lora) * b[i].reshape(lora.rank, -1).T,
                None if norm is None else np.asarray(norm[i], np.float32).reshape(-1),
            )
    return found
