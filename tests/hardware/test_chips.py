"""Options for the TPU compiler, by chip."""

import jax
import pytest
from jax.sharding import AbstractDevice

from solar_jax.errors import UserError
from solar_jax.hardware.chips import CHIPS, compiler_options


def device_of(kind: str) -> AbstractDevice:
    return AbstractDevice(device_kind=kind, num_cores=None, platform="tpu")


def test_collectives_are_offloaded_only_where_that_is_asked_for():
    v6e = device_of("TPU v6 lite")
    plain, offloaded = compiler_options(v6e), compiler_options(v6e, True)
    assert plain == {"xla_tpu_scoped_vmem_limit_kib": "98304"}
    assert plain.items() < offloaded.items()
    assert offloaded["xla_tpu_enable_sparse_core_collective_offload_2d_all_gather"] == "true"
    assert compiler_options(v6e) == plain  # a caller's changes do not reach the next one
    assert compiler_options(jax.devices()[0]) == {}


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_chips_without_sparse_cores_refuse_by_name(name):
    device = device_of(CHIPS[name].kinds[0])
    if name in ("v5p", "v6e"):
        assert len(compiler_options(device, True)) > 3
        return
    with pytest.raises(UserError, match=rf"offload_collectives needs a TPU of v5p, v6e, found {device.device_kind}\."):
        compiler_options(device, True)


def test_a_cpu_refuses():
    with pytest.raises(UserError, match=r"needs a TPU of v5p, v6e, found cpu\."):
        compiler_options(jax.devices()[0], True)
