"""Grow a checkpoint without training it, and write it out as a Hugging Face folder.

    python -m solar_jax.upscale --source SRC --out DIR --operator dus --m 8
    python -m solar_jax.upscale --source SRC --out DIR --slices 0:24,8:32 [--dtype bfloat16] [--dry_run] [--verify]

Weights are streamed: unchanged tensors are copied from file to file in the kernel; memory stays small for any model.
"""

from collections.abc import Sequence

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError

# What is printed once a model is written.
NEXT = """
load it   from transformers import AutoModelForCausalLM, AutoTokenizer
          model = AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")
          tokenizer = AutoTokenizer.from_pretrained("{out}")
heal it   python -m solar_jax.train --config dus_48l:smollm2 --config.source={out} --config.growth.operator=identity \\
              --config.train.control=False --config.data.sources=/path/to/text --workdir runs/healed"""


def define_flags() -> None:
    command.define_conversion_flags()
    flags.DEFINE_bool("dry_run", False, "Show the layer map and stop.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.source or not (f.out or f.dry_run):
        raise UserError("upscale needs --source SRC and --out DIR (or --dry_run).")
    if command.growth_from_flags() is None:
        raise UserError("upscale needs --operator NAME or --slices RANGES.")
    if f.out:
        command.folder_from_flag(f.out)
    command.check_push_flag(f.out)
    check_local(f.source)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints.convert import Target, convert_checkpoint, open_grown
from solar_jax.checkpoints.push import push
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel import processes


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    growth = command.growth_from_flags()
    assert growth is not None
    target = (
        None if f.dry_run else Target(command.folder_from_flag(f.out), "hf", f.dtype, f.max_shard_size, f.overwrite)
    )
    upscale(f.source, growth, target, verify=f.verify)
    if f.push_to_hub and target:
        print(f"uploaded to {push(target.out, f.push_to_hub)}")


def upscale(source: str, growth: GrowthConfig, target: Target | None, *, verify: bool = False) -> None:
    """Writes the grown model to the target, or only shows the layer map.

    Raises:
      UserError: bad source, layer map or target; nothing is written then.
    """
    deeper = open_grown(source, growth)
    if target is None:
        return
    convert_checkpoint(deeper, target, "upscale", verify=verify)
    print(f"{target.out}: {parameter_count(deeper.cfg):,} parameters, source layers {list(deeper.layer_map.source)}")
    print(NEXT.format(out=target.out))


if __name__ == "__main__":
    command.start(main)
