"""Helpers of notebooks: commands in processes of their own, pictures, a folder that outlives the machine.

On a TPU one process owns the chip. A notebook therefore either starts commands, by `run_command`, and never imports jax
itself, or works in its kernel, and starts none.
"""

import codecs
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys

from solar_jax.cli.command import INTERRUPTED_BY_KEY, INTERRUPTED_STATUS, tpu_attached
from solar_jax.cli.help import COMMANDS
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local, path

DRIVE = "/content/drive"  # where Colab shows Google Drive
# What notebook services have in older versions, which pip replaces under a kernel that may have loaded them.
_REPLACED = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "matplotlib", "fsspec", "huggingface_hub")


def run_command(name: str, *flags: str, typed: str = "", makes: str | None = None) -> None:
    """Runs a command of this package as a process of its own, and shows what it says as it says it.

    The notebook's stop button stops it as Ctrl-C does in a terminal: a run saves its step first, and the same cell goes
    on from there. `!` would kill it.

    Args:
      name: train, upscale, generate, ...
      flags: as --name=value; each is one argument, whatever is in it.
      typed: what it reads from its input.
      makes: a file that it makes; where that is there already, nothing is run.

    Raises:
      UserError: the command fails, or the kernel may hold the TPU that it needs.
      KeyboardInterrupt: it was stopped.
    """
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}.")
    if makes is not None and path(makes).exists():
        print(f"{makes}: is there already")
        return
    if "jax" in sys.modules and tpu_attached():
        raise UserError("This kernel has imported jax and may hold the TPU: restart it, and do not import jax in it.")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "solar_jax", name, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,  # the stop button is passed on below, once
    )  # fmt: skip
    status = _shown(process, typed)
    if status in (INTERRUPTED_STATUS, INTERRUPTED_BY_KEY):
        raise KeyboardInterrupt(f"{name} was stopped; the same cell goes on from what is complete.")
    if status:
        raise UserError(f"{name} ended with exit status {status}; why, is above.")


def _shown(process: subprocess.Popen[bytes], typed: str) -> int:
    """Copies a process's output to the notebook until it ends; returns its exit status."""
    assert process.stdin is not None
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    descriptor = process.stdout.fileno()
    try:
        process.stdin.write(typed.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended before it read anything; its status says why
    try:
        while True:
            try:
                if not (piece := os.read(descriptor, 1 << 16)):
                    return process.wait()
                sys.stdout.write(decoder.decode(piece))
                sys.stdout.flush()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
    finally:
        process.stdout.close()
        if process.poll() is None:  # the kernel ends
            process.terminate()
            process.wait()


def show_picture(file: str) -> None:
    """Shows a picture from this machine or a bucket in the notebook."""
    display = importlib.import_module("IPython.display")
    display.display(display.Image(data=path(file).read_bytes()))


def use_folder(folder: str) -> None:
    """Makes a folder usable in Colab: mounts Google Drive for one under /content/drive, logs in for gs://.

    Elsewhere it only creates a local folder.
    """
    in_colab = importlib.util.find_spec("google") and importlib.util.find_spec("google.colab")
    if in_colab and pathlib.PurePath(folder).is_relative_to(DRIVE):
        importlib.import_module("google.colab.drive").mount(DRIVE)
    if in_colab and folder.startswith("gs://"):
        importlib.import_module("google.colab.auth").authenticate_user()
    if is_local(folder):
        path(folder).mkdir(parents=True, exist_ok=True)


def check_kernel() -> None:
    """Checks that the kernel has loaded nothing that the installation has replaced.

    Raises:
      UserError: it has, and must be restarted.
    """
    for name in _REPLACED:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded is not None and loaded != (installed := importlib.metadata.version(name)):
            raise UserError(
                f"This kernel has loaded {name} {loaded}, before {installed} was installed: restart it (in Colab "
                "Runtime, Restart session) and run the cells again from the top."
            )
