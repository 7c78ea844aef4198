"""A checkpoint in another form: SRC to a Hugging Face folder or to one of our own checkpoints.

python -m solar_jax.convert --source SRC --out DIR --to hf [--dtype bfloat16]
python -m solar_jax.convert --source SRC --out DIR --to orbax
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from solar_jax import cli
from solar_jax.config import DTYPES
from solar_jax.errors import UserError
from solar_jax.hf import families
from solar_jax.hf.reader import load_params
from solar_jax.hf.writer import (
    check_target,
    new_folder,
    numpy_dtype,
    parse_size,
    write_checkpoint,
    write_companions,
)
from solar_jax.model.llama import parameter_count
from solar_jax.source import open_checkpoint
from solar_jax.training.checkpoint import MODEL_FOLDER, CheckpointStore


def define_flags() -> None:
    flags.DEFINE_string("source", None, "SRC: HF folder or hub id, .gguf file, a run's folder, or smollm2.")
    flags.DEFINE_string("out", None, "New folder to write.")
    flags.DEFINE_enum("to", None, ("hf", "orbax"), "The form to write.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights written; the source's if not given (orbax: float32).")
    flags.DEFINE_string("max_shard_size", "5GB", "hf: most bytes of weights in one file.")


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    if not f.source or not f.out or not f.to:
        raise UserError("convert needs --source SRC, --out DIR and --to hf|orbax.")
    convert(f.source, pathlib.Path(f.out), f.to, f.dtype, parse_size(f.max_shard_size))


def convert(source: str, out: pathlib.Path, to: str, dtype: str | None, max_shard_size: int) -> None:
    """Writes the checkpoint that SRC names to `out`.

    Raises:
      UserError: bad source or target; nothing is written then.
    """
    if to == "orbax" and dtype not in (None, "float32"):
        raise UserError(f"--to orbax holds training state, which is float32, found --dtype={dtype}.")
    checkpoint = open_checkpoint(source)
    check_target(out)
    dtype = dtype or ("float32" if to == "orbax" else checkpoint.dtype)
    print(
        f"writing {checkpoint.where} ({parameter_count(checkpoint.cfg):,} parameters) as {to}, {dtype}, to {out}",
        flush=True,
    )
    params = load_params(checkpoint, dtype=numpy_dtype("float32" if to == "orbax" else checkpoint.dtype))
    hf_config = families.grown_hf_config(checkpoint.hf_config, checkpoint.cfg.num_hidden_layers, dtype)
    with new_folder(out) as folder:
        if to == "hf":
            write_checkpoint(folder, params, checkpoint.cfg, hf_config, checkpoint.companions, dtype, max_shard_size)
        else:
            (folder / MODEL_FOLDER).mkdir()
            write_companions(folder / MODEL_FOLDER, hf_config, checkpoint.companions)
            with CheckpointStore(folder) as store:
                store.save(0, params=params)
    print(f"{out}: written")


if __name__ == "__main__":
    cli.start(main, define_flags)
