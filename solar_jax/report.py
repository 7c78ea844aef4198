"""Report evaluations: models side by side with standard errors, paired differences and published scores.

    python -m solar_jax.report --out DIR FILE.json [FILE.json ...]

A FILE is what `evaluate` wrote. DIR/report.md has a table for each set of evaluations that may be compared: scores of
subsets, of other items, presets or versions of lm-eval never share one, nor do subsets and SOLAR's published scores.
DIR/report.png shows the same.
"""

from collections.abc import Sequence

from absl import flags

from solar_jax.cli import command
from solar_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder for report.md and report.png.")


def check() -> None:
    """Raises a UserError for flags that cannot work."""
    if not flags.FLAGS.out or not command.files_given():
        raise UserError("report needs --out DIR and one FILE.json of evaluate, or several.")
    command.folder_from_flag(flags.FLAGS.out)


if __name__ == "__main__":
    command.begin(define_flags, check, takes_files=True)  # before the slow imports

from solar_jax.evaluation.report import write_report
from solar_jax.storage import paths


def main(argv: Sequence[str]) -> None:
    files = [paths.path(text) for text in argv[1:]]
    for written in write_report(files, command.folder_from_flag(flags.FLAGS.out)):
        print(f"{written}: written")


if __name__ == "__main__":
    command.start(main)
