"""`solar-jax COMMAND` and `python -m solar_jax COMMAND`: the same as `python -m solar_jax.COMMAND`."""

import runpy
import sys

from solar_jax.cli.help import COMMANDS, HELP, overview, version


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in HELP:
        print(overview())
    elif name == "--version":
        print(version())
    elif name not in COMMANDS:
        sys.stderr.write(f"error: {name!r} is not a command; commands are {', '.join(COMMANDS)}.\n")
        sys.exit(2)
    else:
        del sys.argv[1]
        runpy.run_module(f"solar_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
