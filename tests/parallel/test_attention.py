"""The kernel that each name stands for, and what `auto` takes on which chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from solar_jax.config import Config, MeshConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.model import flash, flash_streamed, splash
from solar_jax.model.flash import flash_attention, needed_memory
from solar_jax.model.flash_streamed import streamed_attention
from solar_jax.model.splash import splash_attention
from solar_jax.parallel import attention
from solar_jax.parallel.attention import attention_choice, attention_kernel, local_kernel
from solar_jax.planning.search import of_slice, options
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL

WIDE = dataclasses.replace(SMALL, head_dim=128)
WHOLE = MeshConfig(1, -1, 1, 1)


def choice(name: str, length: int, wanted: str = "auto", mesh: MeshConfig = WHOLE, precision: str = "mixed") -> str:
    train = TrainConfig(1, 8, attention=wanted, precision=precision)
    return attention_choice(WIDE, train, length, of_slice(find_slice(name)).mesh(mesh))


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("v5e-8", 4096, "flash"),
        ("v5e-8", 16384, "flash"),  # 103 of 128 MiB
        ("v5e-8", 32768, "streamed"),
        ("v5e-8", 131072, "streamed"),  # 126 of 128 MiB, most of it the sum of dq
        ("v5p-8", 8192, "flash"),  # 63.5 of 64 MiB
        ("v5p-8", 32768, "streamed"),
        ("v5p-8", 65536, "splash"),
        ("v4-8", 1024, "splash"),  # 16 MiB hold no row
        ("v5e-8", 4000, "xla"),  # not a multiple of 128
    ],
)
def test_auto_takes_our_kernels_where_they_fit_and_jaxs_where_not(name, length, expected):
    assert choice(name, length) == expected


def test_auto_streams_rows_that_are_split_where_a_devices_share_fits():
    assert choice("v5e-8", 4096, mesh=MeshConfig(1, 2, 1, 4)) == "streamed"
    assert choice("v5p-8", 131072, mesh=MeshConfig(1, 1, 1, 4)) == "streamed"
    assert choice("v5p-8", 131072, mesh=MeshConfig(1, 2, 1, 2)) == "splash"  # shares of 65,536


def test_float32_rows_take_twice_the_memory():
    assert choice("v5p-8", 8192, precision="float32") == "streamed"
    assert needed_memory(8192, 128, 4) > 64 * 2**20 > needed_memory(8192, 128, 2)


def test_splash_is_jaxs_kernel_even_where_ours_fits():
    assert choice("v5e-8", 4096, "splash") == "splash"


@pytest.mark.parametrize(
    ("name", "length", "mesh", "words"),
    [
        ("v5e-8", 4096, MeshConfig(1, 2, 1, 4), "needs whole rows, config.mesh.context=1, found 4"),
        ("v5p-8", 16384, WHOLE, "needs 103 MiB of VMEM for a config.data.sequence_length of 16384, found 64 MiB"),
        ("v5e-8", 4000, WHOLE, "needs a config.data.sequence_length that is a multiple of 128, found 4000"),
    ],
)
def test_flash_is_refused_where_it_does_not_fit(name, length, mesh, words):
    with pytest.raises(UserError, match=f"config.train.attention='flash' {words}"):
        choice(name, length, "flash", mesh)


def test_streamed_is_refused_where_the_sum_of_dq_does_not_fit():
    with pytest.raises(UserError, match=r"'streamed' needs 77 MiB of VMEM .* of 65536, found 64 MiB; 'splash' takes"):
        choice("v5p-8", 65536, "streamed")


def test_cudnn_is_refused_where_it_could_not_run_and_chosen_on_gpus_alone():
    def on_cpu(wanted: str, precision: str) -> str:
        train = TrainConfig(1, 8, attention=wanted, precision=precision)
        return attention_choice(SMALL, train, 16, mesh_of(1, 1, 1))

    with pytest.raises(UserError, match=r"'cudnn' needs 16-bit matmuls .* found 'float32'"):
        on_cpu("cudnn", "float32")
    assert on_cpu("cudnn", "mixed") == "cudnn"
    assert on_cpu("auto", "mixed") == "xla"


def test_the_planner_splits_no_row_where_flash_is_asked_for():
    run = Config(train=TrainConfig(1, 8, remat="none", attention="flash"))
    found = options(WIDE, run, of_slice(find_slice("v5e-8")))
    assert {one.mesh.shape["context"] for one in found} == {1}


def test_each_name_runs_its_own_kernel(monkeypatch):
    assert local_kernel("flash", 0, interpret=True).func is flash_attention
    assert local_kernel("streamed", 0, interpret=True).func is streamed_attention
    assert local_kernel("splash", 0, interpret=True).func is splash_attention
    ran = []
    for name, module in (("flash", flash), ("streamed", flash_streamed), ("splash", splash)):
        kernel = getattr(module, f"{name}_attention")

        def watched(*args, name=name, kernel=kernel, **kwargs):
            ran.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(attention, f"{name}_attention", watched)
        attend = attention_kernel(SMALL, TrainConfig(1, 1, attention=name), 128, mesh_of(1, 1, 1))
        q = jax.ShapeDtypeStruct((1, 128, 4, 128), jnp.float32)
        angles = jax.ShapeDtypeStruct((1, 128, 64), jnp.float32)
        jax.eval_shape(lambda q, a, attend=attend: attend(q, q, q, (a, a), None), q, angles)
    assert ran == ["flash", "streamed", "splash"]
