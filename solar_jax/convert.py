"""Convert SRC to a Hugging Face folder or to one of our own checkpoints, optionally growing it.

    python -m solar_jax.convert --source SRC --out DIR --to hf [--dtype bfloat16] [--verify]
    python -m solar_jax.convert --source SRC --out DIR --to orbax [--operator dus --m 8]

Weights are streamed in blocks: memory stays small for any model, in both directions.
"""

from collections.abc import Sequence

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError


def define_flags() -> None:
    command.define_conversion_flags()
    flags.DEFINE_enum("to", None, ("hf", "orbax"), "Format to write.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.source or not f.out or not f.to:
        raise UserError("convert needs --source SRC, --out DIR and --to hf|orbax.")
    command.growth_from_flags()
    command.folder_from_flag(f.out)
    command.check_push_flag(f.out)
    if f.push_to_hub and f.to != "hf":
        raise UserError(f"--push_to_hub needs --to hf, found {f.to}.")
    check_local(f.source)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints.convert import Target, convert_checkpoint, open_grown
from solar_jax.checkpoints.push import push
from solar_jax.parallel import processes


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    target = Target(command.folder_from_flag(f.out), f.to, f.dtype, f.max_shard_size, f.overwrite)
    convert(f.source, target, command.growth_from_flags(), verify=f.verify)
    if f.push_to_hub:
        print(f"uploaded to {push(target.out, f.push_to_hub)}")


def convert(source: str, target: Target, growth: GrowthConfig | None = None, *, verify: bool = False) -> None:
    """Writes the checkpoint that SRC names to the target.

    Raises:
      UserError: bad source, layer map or target; nothing is written then.
    """
    convert_checkpoint(open_grown(source, growth), target, "convert", verify=verify)
    print(f"{target.out}: written")


if __name__ == "__main__":
    command.start(main)
