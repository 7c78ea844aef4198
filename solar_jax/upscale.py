"""Grow a checkpoint without training it, and write it out as a Hugging Face folder.

python -m solar_jax.upscale --source SRC --out DIR --operator dus --m 8
python -m solar_jax.upscale --source SRC --out DIR --slices 0:24,8:32 [--dtype bfloat16] [--dry_run]
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from solar_jax import cli
from solar_jax.config import DTYPES, GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grow, grown_config
from solar_jax.growth.picture import picture
from solar_jax.growth.plan import OPERATORS, make_plan
from solar_jax.hf import families
from solar_jax.hf.reader import load_params
from solar_jax.hf.writer import check_target, new_folder, numpy_dtype, parse_size, write_checkpoint
from solar_jax.model.llama import parameter_count
from solar_jax.source import open_checkpoint

_DEFAULT = GrowthConfig()
_SOURCE = flags.DEFINE_string("source", None, "SRC: HF folder or hub id, .gguf file, a run's folder, or smollm2.")
_OUT = flags.DEFINE_string("out", None, "New folder to write.")
_OPERATOR = flags.DEFINE_enum("operator", None, sorted(OPERATORS), "Growth operator.")
_SLICES = flags.DEFINE_string("slices", None, "Half-open source ranges one after another, e.g. 0:24,8:32.")
_NUMBERS = {
    key: flags.DEFINE_integer(key, getattr(_DEFAULT, key), f"Of the operator, as config.growth.{key}.")
    for key in ("m", "a", "b", "every", "copies")
}
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights written; the source's if not given.")
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of weights in one file.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the plan and stop.")


def main(argv: Sequence[str]) -> None:
    del argv
    if not _SOURCE.value or not (_OUT.value or _DRY_RUN.value):
        raise UserError("upscale needs --source SRC and --out DIR (or --dry_run).")
    upscale(
        _SOURCE.value,
        pathlib.Path(_OUT.value) if _OUT.value else None,
        growth_config(),
        dtype=_DTYPE.value,
        max_shard_size=parse_size(_SHARD.value),
        dry_run=_DRY_RUN.value,
    )


def growth_config() -> GrowthConfig:
    """The operator that the flags name.

    Raises:
      UserError: none, or both an operator and slices.
    """
    numbers = {key: flag.value for key, flag in _NUMBERS.items()}
    if _SLICES.value is not None:
        if _OPERATOR.value not in (None, "slices"):
            raise UserError(f"--slices and --operator={_OPERATOR.value} exclude each other.")
        return GrowthConfig("slices", slices=_SLICES.value, **numbers)
    if _OPERATOR.value is None:
        raise UserError("upscale needs --operator NAME or --slices RANGES.")
    return GrowthConfig(_OPERATOR.value, **numbers)


def upscale(
    source: str,
    out: pathlib.Path | None,
    growth: GrowthConfig,
    *,
    dtype: str | None,
    max_shard_size: int,
    dry_run: bool,
) -> None:
    """Writes the grown model to `out`, or only shows the plan.

    Raises:
      UserError: bad source, plan or target; nothing is written then.
    """
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint.cfg.num_hidden_layers, growth)
    cfg = grown_config(checkpoint.cfg, plan)
    print(picture(plan, parameter_count(checkpoint.cfg), parameter_count(cfg)), flush=True)
    if dry_run or out is None:
        return
    check_target(out)
    dtype = dtype or checkpoint.dtype
    print(f"writing {checkpoint.where} grown to {cfg.num_hidden_layers} layers as {dtype} to {out}", flush=True)
    params = load_params(checkpoint, dtype=numpy_dtype(checkpoint.dtype))
    grown = jax.jit(lambda p: grow(p, plan))(params)
    hf_config = families.grown_hf_config(checkpoint.hf_config, plan.layers, dtype)
    with new_folder(out) as folder:
        write_checkpoint(folder, grown, cfg, hf_config, checkpoint.companions, dtype, max_shard_size)
    print(f"{out}: {parameter_count(cfg):,} parameters, source layers {list(plan.source)}")


if __name__ == "__main__":
    cli.start(main)
