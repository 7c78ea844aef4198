"""Text of --help: a command's docstring, its flags, the growth operators and the config's keys."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import textwrap
from collections.abc import Iterable

from absl import flags

from solar_jax.cli.config_keys import config_keys
from solar_jax.config import Config
from solar_jax.growth.operators import OPERATORS

COMMANDS = (
    "train", "upscale", "convert", "merge", "chain", "generate", "serve", "evaluate", "report", "search", "seam",
    "study", "plan", "check", "prepare", "make_data",
)  # fmt: skip
HELP = ("--help", "-h", "-help", "--helpshort", "--helpfull", "-?")
_WIDE = 118


def version() -> str:
    return f"solar_jax {importlib.metadata.version('solar_jax')}"


def overview() -> str:
    """Lists the commands, each with the first line of its docstring; imports none of them."""
    lines = [f"{version()}: Depth Up-Scaling (SOLAR 10.7B) in JAX and Flax.", "", "solar-jax COMMAND --help", ""]
    for name in COMMANDS:
        spec = importlib.util.find_spec(f"solar_jax.{name}")
        assert spec is not None
        assert spec.origin is not None
        doc = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""
        lines.append(f"  {name:<10}{doc.splitlines()[0]}")
    return "\n".join(lines)


def command_help(doc: str, own: Iterable[str], tree: type = Config) -> str:
    """Formats the help of a command.

    Args:
      doc: its docstring, with an example.
      own: names of its flags.
      tree: the dataclass of its config.
    """
    own = list(own)
    parts = [doc.strip(), "", "Flags", *(_flag(name) for name in own)]
    if "operator" in own or "config" in own:
        parts += ["", "Growth operators", *(_entry(name, _first_line(OPERATORS[name])) for name in OPERATORS)]
    if "config" in own:
        parts += ["", "Keys of the config, each set by --KEY=VALUE"]
        parts += [_entry(f"{key.name}={key.default}", key.comment) for key in config_keys(tree)]
    return "\n".join(parts)


def _first_line(function: object) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def _flag(name: str) -> str:
    flag = flags.FLAGS[name]
    kind = flag.flag_type()
    written = f"--[no]{name}" if kind == "bool" else f"--{name}={_accepted(flag)}"
    default = f" Default: {flag.default}." if flag.default not in (None, [], "", False) else ""
    said = re.sub(r"^<[^>]*>: ", "", flag.help or "")  # absl puts an enum's values in front
    return _entry(written, f"{said}{default}")


def _accepted(flag: flags.Flag) -> str:
    if values := getattr(flag.parser, "enum_values", None):
        return "|".join(values)
    return {"int": "N", "float": "X", "comma separated list of strings": "A,B"}.get(flag.flag_type(), "TEXT")


def _entry(left: str, right: str) -> str:
    body = textwrap.fill(" ".join(right.split()), _WIDE, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {left}\n{body}" if right else f"  {left}"
