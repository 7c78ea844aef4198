"""Which mesh, remat policy and number of microbatches a run takes: every one that there is, by estimated time and HBM.

A config leaves to the planner what it sets to 0 in `config.mesh`, `train.remat="auto"` and `train.accumulation=0`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from solar_jax.config import Config, MeshConfig, ModelConfig
from solar_jax.errors import UserError
from solar_jax.hardware import chips
from solar_jax.hardware.slices import Slice
from solar_jax.model.llama import REMAT
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel import processes
from solar_jax.parallel.attention import attention_choice
from solar_jax.parallel.mesh import AXES, mesh_shape
from solar_jax.parallel.rules import parameter_shardings
from solar_jax.planning.memory import GIB, Need, estimate
from solar_jax.planning.step_time import StepTime, step_time
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.partition import Partition
from solar_jax.training.state import abstract_state, state_shardings

AUTO = "auto"  # config.train.remat
SPARE = 0.05  # of a device's memory, left alone
NEAR = 0.01  # steps this much slower than the fastest count as equally fast, and the simplest of them is taken
MOST = {"tensor": 16, "context": 16}  # ways to split these axes; more pays on no TPU


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a run is planned for; nothing of it has to be there."""

    count: int
    kind: str  # `device.device_kind`
    platform: str  # "tpu", "gpu" or "cpu"
    memory: float  # bytes of one
    chip: chips.Chip | None = None  # its facts, where it is a TPU
    slices: int = 1

    def mesh(self, cfg: MeshConfig) -> AbstractMesh:
        """The mesh of a config on them."""
        device = AbstractDevice(device_kind=self.kind, num_cores=None, platform=self.platform)
        auto = (AxisType.Auto,) * len(AXES)
        return AbstractMesh(mesh_shape(cfg, self.count, self.slices), AXES, axis_types=auto, abstract_device=device)


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to take a run's step."""

    config: Config  # with nothing left open
    mesh: AbstractMesh
    time: StepTime | None  # None where the chip is not known

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        count = self.config.train.accumulation
        return f"{mesh}, remat {self.config.train.remat}" + (f", {count} microbatches" if count > 1 else "")


def is_open(config: Config) -> bool:
    """Whether a config leaves anything to the planner."""
    open_axes = [axis for axis in AXES if axis != "slice" and getattr(config.mesh, axis) == 0]
    return bool(open_axes) or config.train.remat == AUTO or not config.train.accumulation


def present() -> Devices:
    """The devices that this run has."""
    device = jax.devices()[0]
    name = chips.chip_name(device)
    return Devices(
        count=jax.device_count(),
        kind=device.device_kind,
        platform=device.platform,
        memory=processes.least(chips.memory_bytes(jax.local_devices()[0])),  # all have to choose alike
        chip=chips.CHIPS[name] if name else None,
        slices=len({getattr(d, "slice_index", 0) for d in jax.devices()}),
    )


def of_slice(wanted: Slice) -> Devices:
    """The devices of a slice that is not there."""
    chip = wanted.facts
    return Devices(wanted.devices, chip.kinds[0], "tpu", chip.memory * GIB, chip, wanted.count)


def meshes(config: Config, devices: Devices) -> Iterator[MeshConfig]:
    """Every mesh of the devices that the config allows, each axis given.

    What is no TPU takes what is left open as fsdp: nothing is known there of what a collective costs.
    """
    axes = [axis for axis in AXES if axis != "slice"]
    given = {axis: getattr(config.mesh, axis) for axis in axes}
    free = [axis for axis in axes if given[axis] == 0]
    if devices.chip is None or not free:
        yield config.mesh
        return
    per_slice = devices.count // devices.slices
    divisors = [n for n in range(1, per_slice + 1) if per_slice % n == 0]
    filled = next((axis for axis in axes if given[axis] == -1), free[0])  # takes what the others leave
    others = [axis for axis in free if axis != filled]
    for sizes in itertools.product(*([n for n in divisors if n <= MOST.get(axis, n)] for axis in others)):
        mesh = given | dict(zip(others, sizes, strict=True))
        rest, remainder = divmod(per_slice, math.prod(size for axis, size in mesh.items() if axis != filled))
        if not remainder and rest <= MOST.get(filled, rest):
            yield dataclasses.replace(config.mesh, **mesh | {filled: rest})


def microbatches(config: Config) -> list[int]:
    """The numbers of microbatches that the config allows."""
    if config.train.accumulation:
        return [config.train.accumulation]
    return [k for k in (2**i for i in range(10)) if config.train.batch_size % k == 0]


def options(cfg: ModelConfig, config: Config, devices: Devices, partition: Partition | None = None) -> list[Option]:
    """Every way to take the step that the config allows and the devices and the model divide by, fastest first.

    Where nothing is known of time, what computes least again comes first. Among nearly equal times the simplest mesh
    does, and of its policies the one that saves least.

    Args:
      cfg: the grown model.
      config: the run.
      devices: what it is to run on.
      partition: which parameters train; all if None.

    Raises:
      UserError: there is no such policy, or the mesh that the config asks for does not fit the devices or the model.
    """
    if config.train.remat not in (*REMAT, AUTO):
        raise UserError(f"config.train.remat must be one of {', '.join((*REMAT, AUTO))}, found {config.train.remat!r}.")
    refused: UserError | None = None
    remats = list(REMAT) if config.train.remat == AUTO else [config.train.remat]
    found: list[Option] = []
    for sizes in meshes(config, devices):
        mesh = devices.mesh(sizes)
        try:
            parameter_shardings(cfg, mesh)
            attention_choice(cfg, config, mesh)
        except UserError as e:
            refused = e
            continue
        for remat, count in itertools.product(remats, microbatches(config)):
            train = dataclasses.replace(config.train, remat=remat, accumulation=count)
            chosen = dataclasses.replace(config, mesh=sizes, train=train)
            found.append(
                Option(chosen, mesh, step_time(cfg, chosen, mesh, devices.chip, partition) if devices.chip else None)
            )
    if not found:
        raise refused or UserError(f"config.mesh fits no {devices.count} devices.")
    return sorted(found, key=_rank)


def _rank(option: Option) -> tuple[float, ...]:
    train, mesh = option.config.train, option.mesh.shape
    policy = list(REMAT).index(train.remat)
    simple = train.accumulation, *(mesh[axis] for axis in ("tensor", "context", "data"))
    if option.time is None:
        return policy, *simple
    return round(math.log(option.time.total) / NEAR), *simple, -policy


def need(cfg: ModelConfig, option: Option, partition: Partition | None = None) -> Need:
    """What an option takes of a device's memory."""
    optimizer = make_optimizer(option.config)
    shardings = state_shardings(cfg, optimizer, option.mesh, partition)
    state = abstract_state(cfg, option.config, optimizer, shardings, partition)
    return estimate(cfg, option.config, state, option.mesh, partition)


def fits(wanted: Need, devices: Devices) -> bool:
    return wanted.total <= (1 - SPARE) * devices.memory


def best(
    cfg: ModelConfig, found: list[Option], devices: Devices, partition: Partition | None = None
) -> tuple[Option, Need]:
    """The first of the options that fits; where none does, the one that needs least."""
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
    """The option with every remat policy there is."""
    found = []
    for remat in REMAT:
        config = dataclasses.replace(option.config, train=dataclasses.replace(option.config.train, remat=remat))
        seconds = step_time(cfg, config, option.mesh, devices.chip, partition) if devices.chip else None
        found.append(Option(config, option.mesh, seconds))
    return found


def choose(
    cfg: ModelConfig, config: Config, devices: Devices, partition: Partition | None = None
) -> tuple[Option, Need]:
    """The best way to take the step that fits.

    Raises:
      UserError: none fits, with the smallest need that there is; or as `options`.
    """
    option, wanted = best(cfg, options(cfg, config, devices, partition), devices, partition)
    if fits(wanted, devices):
        return option, wanted
    fallback = f"; {config.fallback} fits a laptop" if config.fallback else ""
    raise UserError(
        f"{config.name}, {parameter_count(cfg):,} parameters, needs at least {wanted} with {option}, but each of the "
        f"{devices.count} {devices.kind} device(s) has {devices.memory / GIB:.1f} GiB{fallback}."
    )
