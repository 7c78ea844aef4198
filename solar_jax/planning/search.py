"""Chooses a run's mesh, remat policy and number of microbatches among all that exist, by estimated time and HBM.

A config leaves to the planner the axes of `config.mesh` set to 0, `train.remat="auto"` and `train.accumulation=0`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from solar_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from solar_jax.data.chat.formats import kind_of
from solar_jax.errors import UserError
from solar_jax.hardware import chips
from solar_jax.hardware.slices import Slice
from solar_jax.model.precision import Precision, precision
from solar_jax.model.remat import REMAT
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel import processes
from solar_jax.parallel.attention import attention_choice
from solar_jax.parallel.mesh import AXES, mesh_shape
from solar_jax.parallel.rules import parameter_shardings
from solar_jax.planning.memory import GIB, Need, estimate
from solar_jax.planning.step_time import StepTime, step_time
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.partition import Partition
from solar_jax.training.state import State, abstract_state, state_shardings

AUTO = "auto"  # config.train.remat
SPARE = 0.05  # fraction of a device's memory that stays free
NEAR = 0.01  # steps slower by at most this fraction count as equally fast, and the simplest is taken
MOST = {"tensor": 16, "context": 16}  # most ways to shard these axes; more pays off on no TPU


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that a run is planned for; they need not exist."""

    count: int
    kind: str  # `device.device_kind`
    platform: str  # "tpu", "gpu" or "cpu"
    memory: float  # bytes per device
    chip: chips.Chip | None = None  # the chip's data, if it is a TPU
    slices: int = 1

    def mesh(self, cfg: MeshConfig) -> AbstractMesh:
        """Returns the mesh of a config on these devices."""
        device = AbstractDevice(device_kind=self.kind, num_cores=None, platform=self.platform)
        auto = (AxisType.Auto,) * len(AXES)
        return AbstractMesh(mesh_shape(cfg, self.count, self.slices), AXES, axis_types=auto, abstract_device=device)


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run the step."""

    config: Config  # with nothing left open
    mesh: AbstractMesh
    time: StepTime | None  # None if the chip is unknown

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        count = self.config.train.accumulation
        return f"{mesh}, remat {self.config.train.remat}" + (f", {count} microbatches" if count > 1 else "")


def is_open(config: Config) -> bool:
    """Returns whether a config leaves anything to the planner."""
    open_axes = [axis for axis in AXES if axis not in ("slice", "expert") and getattr(config.mesh, axis) == 0]
    return bool(open_axes) or config.train.remat == AUTO or not config.train.accumulation


def present() -> Devices:
    """Returns the devices that this run has."""
    device = jax.devices()[0]
    name = chips.chip_name(device)
    return Devices(
        count=jax.device_count(),
        kind=device.device_kind,
        platform=device.platform,
        memory=processes.least(chips.memory_bytes(jax.local_devices()[0])),  # all processes must choose alike
        chip=chips.CHIPS[name] if name else None,
        slices=len({getattr(d, "slice_index", 0) for d in jax.devices()}),
    )


def of_slice(wanted: Slice) -> Devices:
    """Returns the devices of a slice, which need not exist."""
    chip = wanted.facts
    return Devices(wanted.devices, chip.kinds[0], "tpu", chip.memory * GIB, chip, wanted.count)


def meshes(config: Config, devices: Devices, experts: int = 0) -> Iterator[MeshConfig]:
    """Yields every mesh of the devices that the config allows, with each axis set.

    On anything but a TPU the cost of a collective is unknown. There all devices go to fsdp if that is open, or as many
    as divide the model and the others to data: `options` takes the first that it can. `experts` are the model's.
    """
    if not experts and config.mesh.expert == 0:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=1))
    if kind_of(config.data.format) != "text" and config.mesh.context == 0:  # their rows are not split
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, context=1))
    axes = [axis for axis in AXES if axis != "slice"]
    given = {axis: getattr(config.mesh, axis) for axis in axes}
    free = [axis for axis in axes if given[axis] == 0]
    if devices.chip is None or not free:
        yield config.mesh
        if config.mesh.fsdp == 0 and config.mesh.data == 0 and -1 not in given.values():
            rest = devices.count // devices.slices // math.prod(size for size in given.values() if size > 0)
            for data in (n for n in range(2, rest + 1) if rest % n == 0):
                yield dataclasses.replace(config.mesh, data=data, fsdp=rest // data)
        return
    per_slice = devices.count // devices.slices
    divisors = [n for n in range(1, per_slice + 1) if per_slice % n == 0]
    filled = next((axis for axis in axes if given[axis] == -1), free[0])  # takes the devices that the others leave
    others = [axis for axis in free if axis != filled]
    for sizes in itertools.product(*([n for n in divisors if n <= MOST.get(axis, n)] for axis in others)):
        mesh = given | dict(zip(others, sizes, strict=True))
        rest, remainder = divmod(per_slice, math.prod(size for axis, size in mesh.items() if axis != filled))
        if not remainder and rest <= MOST.get(filled, rest):
            yield dataclasses.replace(config.mesh, **mesh | {filled: rest})


def microbatches(config: Config) -> list[int]:
    """Returns the numbers of microbatches that the config allows."""
    if config.train.accumulation:
        return [config.train.accumulation]
    return [k for k in (2**i for i in range(10)) if config.train.batch_size % k == 0]


def options(cfg: ModelConfig, config: Config, devices: Devices, partition: Partition | None = None) -> list[Option]:
    """Returns every way to run the step that the config allows and that divides devices and model, fastest first.

    If time is unknown, the option that recomputes least comes first. Among nearly equal times the simplest mesh does,
    and of its policies the one that saves the fewest activations.

    Args:
      cfg: the grown model.
      config: the run.
      devices: the devices to run on.
      partition: which parameters train; all if None.

    Raises:
      UserError: unknown policy, or the mesh that the config asks for does not fit the devices or the model.
    """
    if config.train.remat not in (*REMAT, AUTO):
        raise UserError(f"config.train.remat must be one of {', '.join((*REMAT, AUTO))}, found {config.train.remat!r}.")
    if config.mesh.expert > 1 and not cfg.num_local_experts:
        raise UserError(f"config.mesh.expert={config.mesh.expert} needs a model of experts, found a dense one.")
    refused: UserError | None = None
    remats = list(REMAT) if config.train.remat == AUTO else [config.train.remat]
    found: list[Option] = []
    for sizes in meshes(config, devices, cfg.num_local_experts):
        if found and devices.chip is None:
            break
        try:
            mesh = devices.mesh(sizes)
            parameter_shardings(cfg, mesh)
            attention_choice(cfg, config.train, config.data.sequence_length, mesh)
            chips.compiler_options(mesh.abstract_device, config.train.offload_collectives)
        except UserError as e:
            refused = refused or e  # the first is of the mesh that the config means
            continue
        for remat, count in itertools.product(remats, microbatches(config)):
            train = dataclasses.replace(config.train, remat=remat, accumulation=count)
            chosen = dataclasses.replace(config, mesh=sizes, train=train)
            found.append(
                Option(
                    chosen,
                    mesh,
                    step_time(cfg, chosen.train, chosen.data.sequence_length, mesh, devices.chip, partition)
                    if devices.chip
                    else None,
                )
            )
    if not found:
        raise refused or UserError(f"config.mesh does not fit {devices.count} devices.")
    return sorted(found, key=_rank)


def _rank(option: Option) -> tuple[float, ...]:
    train, mesh = option.config.train, option.mesh.shape
    policy = list(REMAT).index(train.remat)
    simple = train.accumulation, *(mesh[axis] for axis in ("tensor", "context", "data"))
    if option.time is None:
        return policy, *simple
    return round(math.log(option.time.total) / NEAR), *simple, -policy


def need(cfg: ModelConfig, option: Option, partition: Partition | None = None) -> Need:
    """Estimates the device memory that an option needs."""
    policy, config = precision(option.config.train), option.config
    state = _state(cfg, config.optimizer, max(1, config.train.steps), policy, config.seed, option.mesh, partition)
    return estimate(cfg, option.config.train, option.config.data.sequence_length, state, option.mesh, partition)


@functools.lru_cache(maxsize=1024)  # options differ in what is saved and in microbatches, for one state
def _state(
    cfg: ModelConfig, optimizer: OptimizerConfig, steps: int, policy: Precision, seed: int, mesh: AbstractMesh,
    partition: Partition | None,
) -> State:  # fmt: skip
    """Returns the abstract training state on a mesh."""
    update = make_optimizer(optimizer, steps, policy, seed=seed)
    shardings, base = state_shardings(cfg, update, mesh, partition), partition.base_dtype(policy) if partition else ""
    return abstract_state(cfg, policy.weights, update, shardings, partition, base)


def fits(wanted: Need, devices: Devices) -> bool:
    return wanted.total <= (1 - SPARE) * devices.memory


def best(
    cfg: ModelConfig, found: list[Option], devices: Devices, partition: Partition | None = None
) -> tuple[Option, Need]:
    """Returns the first option that fits or, if none does, the one that needs least memory."""
    smallest: tuple[Option, Need] | None = None
    for option in found:
        wanted = need(cfg, option, partition)
        if fits(wanted, devices):
            return option, wanted
        if smallest is None or wanted.total < smallest[1].total:
            smallest = option, wanted
    assert smallest is not None
    return smallest


def other_policies(
    cfg: ModelConfig, option: Option, devices: Devices, partition: Partition | None = None
) -> list[Option]:
    """Returns the option with every remat policy there is."""
    found = []
    for remat in REMAT:
        config = dataclasses.replace(option.config, train=dataclasses.replace(option.config.train, remat=remat))
        seconds = (
            step_time(cfg, config.train, config.data.sequence_length, option.mesh, devices.chip, partition)
            if devices.chip
            else None
        )
        found.append(Option(config, option.mesh, seconds))
    return found


def choose(
    cfg: ModelConfig, config: Config, devices: Devices, partition: Partition | None = None
) -> tuple[Option, Need]:
    """Returns the best way to run the step that fits.

    Raises:
      UserError: none fits (the message names the smallest need), or as in `options`.
    """
    option, wanted = best(cfg, options(cfg, config, devices, partition), devices, partition)
    if fits(wanted, devices):
        return option, wanted
    fallback = f"; {config.fallback} fits a laptop" if config.fallback else ""
    raise UserError(
        f"{config.name}, {parameter_count(cfg):,} parameters, needs at least {wanted} with {option}, but each of the "
        f"{devices.count} {devices.kind} device(s) has {devices.memory / GIB:.1f} GiB{fallback}."
    )
