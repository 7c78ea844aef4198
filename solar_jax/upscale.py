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

NUMBERS = ("m", "a", "b", "every", "copies")  # the operators' numbers, fields of GrowthConfig


def define_flags() -> None:
    flags.DEFINE_string("source", None, "SRC: HF folder or hub id, .gguf file, a run's folder, or smollm2.")
    flags.DEFINE_string("out", None, "New folder to write.")
    flags.DEFINE_enum("operator", None, sorted(OPERATORS), "Growth operator.")
    flags.DEFINE_string("slices", None, "Half-open source ranges one after another, e.g. 0:24,8:32.")
    for key in NUMBERS:
        flags.DEFINE_integer(key, getattr(GrowthConfig(), key), f"Of the operator, as config.growth.{key}.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights written; the source's if not given.")
    flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of weights in one file.")
    flags.DEFINE_bool("dry_run", False, "Show the plan and stop.")


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    if not f.source or not (f.out or f.dry_run):
        raise UserError("upscale needs --source SRC and --out DIR (or --dry_run).")
    growth = growth_config(f.operator, f.slices, {key: getattr(f, key) for key in NUMBERS})
    out = pathlib.Path(f.out) if f.out else None
    upscale(f.source, out, growth, dtype=f.dtype, max_shard_size=parse_size(f.max_shard_size), dry_run=f.dry_run)


def growth_config(operator: str | None, slices: str | None, numbers: dict[str, int]) -> GrowthConfig:
    """The growth that the flags name.

    Raises:
      UserError: neither an operator nor slices, or both.
    """
    if slices is not None and operator not in (None, "slices"):
        raise UserError(f"--slices and --operator={operator} exclude each other.")
    if slices is None and operator is None:
        raise UserError("upscale needs --operator NAME or --slices RANGES.")
    return GrowthConfig("slices" if slices is not None else str(operator), slices=slices or "", **numbers)


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
    cli.start(main, define_flags)
