"""The attention kernel of a run, checked on its machine before the run trusts it, and what is taken in its place."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax

from solar_jax.checking.kernels import Case, compared
from solar_jax.config import Config, ModelConfig
from solar_jax.hardware.versions import installed_versions
from solar_jax.model.precision import compute_dtype
from solar_jax.parallel import processes
from solar_jax.parallel.attention import attention_choice, local_kernel
from solar_jax.parallel.mesh import axis_size
from solar_jax.planning.search import Option
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.storage.paths import is_local, path

# Kernel -> the one that is taken if it is wrong.
NEXT = {"flash": "splash", "streamed": "splash", "splash": "xla", "cudnn": "xla"}
LONG = 8192  # tokens; of longer rows one key head is compared, of shorter ones two

Say = Callable[[str], None]


def sound_attention(wanted: str, choose: Callable[[str], str], probe: Callable[[str], str], warn: Say) -> str:
    """Returns the value of config.train.attention with which a run can go on.

    Args:
      wanted: the config's.
      choose: gives the kernel that the run takes for a value of config.train.attention.
      probe: gives what is wrong with a kernel on this machine, "" if nothing is.
      warn: reports each kernel that is left.
    """
    name = wanted
    while (kernel := choose(name)) in NEXT and (problem := probe(kernel)):
        name = NEXT[kernel]
        warn(f"attention kernel {kernel!r} {problem}; the run takes {name!r} in its place")
    return name


def attention_for_run(cfg: ModelConfig, option: Option, platform: str, say: Say, warn: Say) -> str:
    """Returns config.train.attention of a run, once its kernel has been compared with plain attention here.

    Every process must call it. Off TPU and GPU nothing is compared: kernels would be interpreted.

    Args:
      cfg: the grown model.
      option: how the run goes, as planned.
      platform: of its devices.
      say: prints what is being checked, up to a minute, once a machine.
      warn: reports each kernel that is left.
    """
    config = option.config
    if platform not in ("tpu", "gpu"):
        return config.train.attention
    case = case_of_run(cfg, config, axis_size(option.mesh, "tensor"), axis_size(option.mesh, "context"))

    def choose(name: str) -> str:
        train = dataclasses.replace(config.train, attention=name)
        return attention_choice(cfg, train, config.data.sequence_length, option.mesh)

    def probe(kernel: str) -> str:
        problem = probed_once(kernel, case, marker_folder(), lambda: probed_here(kernel, case, say))
        return problem if processes.agree(not problem) else problem or "is wrong on another machine of this run"

    return sound_attention(config.train.attention, choose, probe, warn)


def case_of_run(cfg: ModelConfig, config: Config, tensor: int, context: int) -> Case:
    """Returns one row of a run as a device sees it, with one or two of its key heads.

    Where rows are split over devices, the kernel is compared on a whole one as long as a device's share.

    Args:
      cfg: the model.
      config: the run.
      tensor: devices that share the heads.
      context: devices that share a row.
    """
    length = config.data.sequence_length // context
    kv_heads = 1 if length > LONG else min(2, max(1, cfg.num_key_value_heads // tensor))
    return Case(
        str(compute_dtype(config.train)), cfg.head_dim, kv_heads * cfg.num_attention_heads // cfg.num_key_value_heads,
        kv_heads, segmented=True, window=cfg.sliding_window, length=length, rows=1,
    )  # fmt: skip


def probed_here(kernel: str, case: Case, say: Say) -> str:
    """Compares a kernel with plain attention on the first local device; returns what is wrong, or ""."""
    say(f"checking attention kernel {kernel!r} against plain attention: {case}")
    return compared(kernel, local_kernel(kernel, case.window, interpret=False), case).problem


def probed_once(kernel: str, case: Case, folder: pathlib.Path | None, probe: Callable[[], str]) -> str:
    """Returns what a probe found on this machine when it first ran with these versions.

    Args:
      kernel: its name.
      case: what it is compared on.
      folder: where a file says what was found; None to probe every time.
      probe: finds what is wrong, or "".
    """
    if folder is None:
        return probe()
    key = {"kernel": kernel, "case": dataclasses.asdict(case)} | machine_key()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = folder / f"{digest[:24]}.json"
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read, or was damaged
        if (known := read_json(file)) is not None:
            return known["problem"] and f"{known['problem']} (found before; remove {file} to check again)"
    problem = probe()
    with contextlib.suppress(OSError):  # a disk that is full or read-only costs another check at the next start
        if is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"problem": problem} | key)
    return problem


def machine_key() -> dict[str, str]:
    """Returns what a kernel's result depends on besides its shapes: the chip and the versions of what compiles it."""
    packages = ("solar_jax", "jax", "jaxlib", "libtpu")
    return dict.fromkeys(packages, "") | installed_versions(packages) | {"device": jax.local_devices()[0].device_kind}


def marker_folder() -> pathlib.Path | None:
    """Returns the folder beside the compilation cache that notes which kernels were checked; None without a cache."""
    cache = jax.config.jax_compilation_cache_dir
    return path(f"{cache.rstrip('/')}_checked") if cache and jax.config.jax_enable_compilation_cache else None
