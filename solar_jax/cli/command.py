"""How every command starts and ends: flags in, one sentence and a status out."""

import errno
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from logging import ERROR, LogRecord
from typing import NoReturn

from absl import app, flags, logging

from solar_jax.checkpoints.convert import Target
from solar_jax.config import DTYPES, GrowthConfig, check_override
from solar_jax.errors import Interrupted, UserError
from solar_jax.growth.operators import OPERATORS
from solar_jax.parallel import processes
from solar_jax.storage import paths

USAGE_STATUS = 2  # of bad flags and bad input
INTERRUPTED_STATUS = 75  # of a run that was asked to stop and goes on when it is started again
_PLACES = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
GROWTH_NUMBERS = ("m", "a", "b", "every", "copies")  # the operators' numbers, fields of GrowthConfig


def start(main: Callable[[Sequence[str]], None], define_flags: Callable[[], None]) -> None:
    """Defines and parses absl's flags and runs `main`; bad flags and `UserError` become one sentence and status 2.

    Flags are defined here and not on import, so that commands can be imported side by side.
    """
    define_flags()
    logging.set_verbosity(logging.WARNING)  # the libraries' notes on every file they touch; --verbosity=0 shows them
    logging.get_absl_handler().addFilter(_is_news)
    app.run(lambda argv: _guarded(lambda: main(_no_rest(argv))), flags_parser=_parse)


def _is_news(record: LogRecord) -> bool:
    """Whether a library's note is shown: Orbax logs what goes wrong with a traceback in each of its threads, and raises
    it as well.
    """
    return record.levelno != ERROR or "orbax" not in record.pathname or logging.get_verbosity() >= logging.INFO


def define_conversion_flags() -> None:
    """What `upscale` and `convert` share."""
    flags.DEFINE_string("source", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_string("out", None, "New folder to write.")
    flags.DEFINE_enum("operator", None, sorted(OPERATORS), "Growth operator.")
    flags.DEFINE_string("slices", None, "Half-open source ranges one after another, e.g. 0:24,8:32.")
    for key in GROWTH_NUMBERS:
        flags.DEFINE_integer(key, getattr(GrowthConfig(), key), f"Of the operator, as config.growth.{key}.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights written; each as it is stored if not given.")
    flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of weights in one HF file.")
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint that stands at --out.")
    flags.DEFINE_bool("verify", False, "Write certificate.json: every tensor's hash and the logits, compared.")


def growth_config(operator: str | None, slices: str | None, numbers: dict[str, int]) -> GrowthConfig | None:
    """The growth that the flags name; None where they name none.

    Raises:
      UserError: both an operator and slices.
    """
    if slices is not None and operator not in (None, "slices"):
        raise UserError(f"--slices and --operator={operator} exclude each other.")
    if slices is None and operator is None:
        return None
    return GrowthConfig("slices" if slices is not None else str(operator), slices=slices or "", **numbers)


def growth_from_flags() -> GrowthConfig | None:
    f = flags.FLAGS
    return growth_config(f.operator, f.slices, {key: getattr(f, key) for key in GROWTH_NUMBERS})


def place(text: str) -> pathlib.Path:
    """A local path, or a bucket's behind the same interface.

    Raises:
      UserError: a URL of something else than a folder in a bucket.
    """
    if not paths.is_local(text) and not re.fullmatch(r"(gs|s3)://[^/]+/+[^/].*", text, re.DOTALL):
        raise UserError(f"{text}: expected a local folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.")
    return paths.path(text)


def target(form: str) -> Target:
    """What the flags say is to be written."""
    f = flags.FLAGS
    return Target(place(f.out), form, f.dtype, f.max_shard_size, f.overwrite)


def _parse(argv: Sequence[str]) -> list[str]:
    # A config file is read while its flag is parsed, so whatever it does wrong appears here too.
    try:
        for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if match := re.fullmatch(r"--?(config(?:\.\w+)+)(?:=.*)?", arg, re.DOTALL):
                check_override(match[1])
            elif match := re.fullmatch(r"--?config(?:=(.*))?", arg):
                file = (following if match[1] is None else match[1]).split(":", 1)[0]
                if not pathlib.Path(file).is_file():
                    raise UserError(f"--config: {file}: no such file.")
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, UserError) as e:
        text = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
        if "Traceback" in text:  # a config file that failed: the user's own code, so all of it is of use
            sys.stderr.write(text + "\n")
            sys.exit(USAGE_STATUS)
        _stop(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _no_rest(argv: Sequence[str]) -> Sequence[str]:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    return argv


def _guarded(run: Callable[[], None]) -> None:
    try:
        processes.start()
        run()
    except UserError as e:
        _stop(str(e))
    except Interrupted as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(INTERRUPTED_STATUS)
    except OSError as e:
        if e.errno not in _PLACES:
            raise
        _stop(f"{e.filename or 'a file'}: {e.strerror}; nothing that was complete is lost.")
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last checkpoint.", 130)


def _stop(sentence: str, status: int = USAGE_STATUS) -> NoReturn:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(status)
