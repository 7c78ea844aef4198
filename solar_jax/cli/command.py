"""How every command starts and ends: flags in, one sentence and an exit status out.

Nothing here imports jax: `begin` answers --help and refuses bad flags, config keys and paths before a command's own
imports, which take seconds.
"""

import errno
import importlib.util
import itertools
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from logging import ERROR, LogRecord
from typing import Any, NoReturn

from absl import app, flags, logging

from solar_jax.cli.config_files import find_config
from solar_jax.cli.config_keys import check_override
from solar_jax.cli.help import HELP, command_help, version
from solar_jax.config import DTYPES, Config, GrowthConfig
from solar_jax.errors import Interrupted, UserError
from solar_jax.growth.operators import EXPERT_KEYS, OPERATOR_KEYS, OPERATORS
from solar_jax.storage import paths

USAGE_STATUS = 2  # bad flags and bad input
INTERRUPTED_BY_KEY = 130  # 128 + SIGINT
INTERRUPTED_STATUS = 75  # a run that was asked to stop, and resumes when it is started again
_FILE_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}

_argv: list[str] = []  # what `begin` left after the flags


def begin(
    define_flags: Callable[[], None], check: Callable[[], None], *, takes_files: bool = False, tree: type = Config
) -> None:
    """Defines and parses the flags and checks what they name; bad input ends the command with status 2.

    A command calls it before its slow imports. Flags are defined here and not on import, so that commands can be
    imported side by side.

    Args:
      define_flags: the command's own.
      check: raises a UserError for flags that cannot work; must not import jax.
      takes_files: whether arguments that are no flags are files, given to `main`, rather than mistakes.
      tree: the dataclass whose keys --config.KEY=VALUE may change.
    """
    signal.signal(signal.SIGINT, _interrupted)  # a traceback through the imports would say nothing
    if "--version" in sys.argv[1:]:
        print(version())
        sys.exit()
    before = set(flags.FLAGS)
    define_flags()
    if any(arg in HELP for arg in sys.argv[1:]):
        print(command_help(sys.modules["__main__"].__doc__ or "", (f for f in flags.FLAGS if f not in before), tree))
        sys.exit()
    logging.set_verbosity(logging.WARNING)  # the libraries note every file they touch; --verbosity=0 shows that
    flags.FLAGS.set_gnu_getopt(takes_files)  # flags may then follow files
    _argv[:] = _parse(sys.argv[:], tree)
    _leave_absent_tpu_alone()
    _guarded(lambda: (takes_files or _no_rest(_argv), check()))


def files_given() -> list[str]:
    """Returns the arguments that are no flags."""
    return _argv[1:]


def tpu_attached() -> bool:
    """Returns whether this machine has a TPU; does not import jax, which would take it."""
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))


def _leave_absent_tpu_alone() -> None:
    """Has jax not look for TPUs where none is attached, since libtpu then complains in five lines.

    Only where jax would find nothing but the CPU: a GPU's plugin, or the user's own choice, is left as it is.
    """
    plugins = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_plugins"))
    if importlib.util.find_spec("libtpu") and not (tpu_attached() or plugins):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def start(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command that has begun; `UserError` becomes one sentence and status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.get_absl_handler().addFilter(_is_news)
    app.run(lambda argv: _guarded(lambda: main(argv)), argv=_argv, flags_parser=lambda argv: list(argv))


def _is_news(record: LogRecord) -> bool:
    """True if a library's note is shown: Orbax logs each failure in each of its threads, and raises it too."""
    return record.levelno != ERROR or "orbax" not in record.pathname or logging.get_verbosity() >= logging.INFO


def define_conversion_flags() -> None:
    """Defines the flags that `upscale` and `convert` share."""
    flags.DEFINE_string("source", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_enum("operator", None, sorted(OPERATORS), "Growth operator.")
    flags.DEFINE_string("slices", None, "Half-open source ranges one after another, e.g. 0:24,8:32.")
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for key in (*OPERATOR_KEYS, *EXPERT_KEYS):
        default = getattr(GrowthConfig(), key)
        whose = "Experts'" if key in EXPERT_KEYS else "The operator's"
        define[type(default)](key, default, f"{whose}, as config.growth.{key}.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of the weights written; each as it is stored if not given.")
    define_target_flags()


def define_target_flags() -> None:
    """Defines the flags of every command that writes a checkpoint."""
    flags.DEFINE_string("out", None, "New folder to write.")
    flags.DEFINE_string("max_shard_size", "5GB", "Most bytes of weights in one HF file.")
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint at --out.")
    flags.DEFINE_string("push_to_hub", None, "OWNER/NAME: upload the HF folder to the hub; needs a login.")
    flags.DEFINE_bool("verify", False, "Write certificate.json: every tensor's hash and the logits, compared.")


def growth_config(operator: str | None, slices: str | None, keys: dict[str, Any]) -> GrowthConfig | None:
    """The growth that the flags name; None where they name none.

    Raises:
      UserError: both an operator and slices.
    """
    if slices is not None and operator not in (None, "slices"):
        raise UserError(f"--slices and --operator={operator} exclude each other.")
    if slices is None and operator is None:
        return GrowthConfig("identity", **keys) if keys.get("experts") else None
    return GrowthConfig(operator or "slices", slices=slices or "", **keys)


def growth_from_flags() -> GrowthConfig | None:
    f = flags.FLAGS
    return growth_config(f.operator, f.slices, {key: getattr(f, key) for key in (*OPERATOR_KEYS, *EXPERT_KEYS)})


def folder_from_flag(text: str) -> pathlib.Path:
    """A local path, or a bucket's behind the same interface.

    Raises:
      UserError: a URL that is not a folder in a bucket.
    """
    if not paths.is_local(text) and not re.fullmatch(r"(gs|s3)://[^/]+/+[^/].*", text, re.DOTALL):
        raise UserError(f"{text}: expected a local folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.")
    return paths.path(text)


def check_push_flag(out: str | None) -> None:
    """Raises a UserError for a --push_to_hub that cannot work."""
    repo = flags.FLAGS.push_to_hub
    if repo is None:
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise UserError(f"--push_to_hub must be OWNER/NAME, found {repo!r}.")
    if out is None or not paths.is_local(out):
        raise UserError(f"--push_to_hub uploads a local folder, found --out={out}.")
    import huggingface_hub  # imported here: slow, and few conversions are uploaded

    if not huggingface_hub.get_token():
        raise UserError(
            f"--push_to_hub={repo}: no login; run `hf auth login`, or set HF_TOKEN to a token that can write."
        )


def _interrupted(*_: object) -> NoReturn:
    _stop("interrupted.", INTERRUPTED_BY_KEY)


def _parse(argv: list[str], tree: type) -> list[str]:
    # A config file is read while its flag is parsed, so its own errors appear here too. Of `merge`, it is plain text.
    finds = "config" in flags.FLAGS and flags.FLAGS["config"].flag_type() != "string"
    try:
        for k, (arg, following) in enumerate(itertools.zip_longest(argv[:], argv[1:], fillvalue="")):
            if match := re.fullmatch(r"--?(config(?:\.\w+)+)(?:=.*)?", arg, re.DOTALL):
                check_override(match[1], tree)
            elif finds and (match := re.fullmatch(r"--?config(?:=(.*))?", arg)):
                at = k if match[1] is not None else k + 1
                argv[at:] = [("--config=" if at == k else "") + find_config(match[1] or following), *argv[at + 1 :]]
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, UserError) as e:
        text = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
        if "Traceback" in text:  # a config file that failed: the user's own code, so all of it is of use
            sys.stderr.write(text + "\n")
            sys.exit(USAGE_STATUS)
        _stop(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _no_rest(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")


def _guarded(run: Callable[[], object]) -> None:
    try:
        run()
    except UserError as e:
        _stop(str(e))
    except Interrupted as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(INTERRUPTED_STATUS)
    except OSError as e:
        if e.errno not in _FILE_ERRORS:
            raise
        _stop(f"{e.filename or 'a file'}: {e.strerror}; nothing that was complete is lost.")
    except KeyboardInterrupt as e:
        _stop(str(e) or "interrupted; the same command goes on from what is complete.", INTERRUPTED_BY_KEY)


def _stop(sentence: str, status: int = USAGE_STATUS) -> NoReturn:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(status)
