"""Names of slices, and what they stand for."""

import pytest

from solar_jax.errors import UserError
from solar_jax.hardware.slices import SLICES, find_slice


@pytest.mark.parametrize(
    ("name", "chips", "devices", "topology"),
    [
        ("v4-32", 16, 16, "2x2x4"),  # v4, v5p and TPU7x are named by their cores, two a chip
        ("v5p-128", 64, 64, "4x4x4"),
        ("v5p-12288", 6144, 6144, "16x16x24"),
        ("v5e-256", 256, 256, "16x16"),
        ("v5litepod-16", 16, 16, "4x4"),
        ("v6e-8", 8, 8, "2x4"),
        ("tpu7x-128", 64, 128, "4x4x4"),  # each core is a device
        ("2xv5p-2048", 2048, 2048, "8x8x16"),
        (" V6E-256 ", 256, 256, "16x16"),
    ],
)
def test_a_slice_has_the_chips_that_its_name_says(name, chips, devices, topology):
    found = find_slice(name)
    assert (found.chips, found.devices, found.topology) == (chips, devices, topology)


def test_several_slices_keep_their_number_in_the_name():
    assert find_slice("4xv6e-256").name == "4xv6e-256"
    assert find_slice("1xv6e-256") == find_slice("v6e-256")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-100", "no slice 'v5p-100'; v5p slices come in sizes 8, 16, 32, 64, 128"),
        ("v5p128", "did you mean v5p-128"),
        ("h100-8", "slice names look like v5p-128"),
        ("0xv5p-128", "no slice '0xv5p-128'"),
        ("", "chips are v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_what_does(name, said):
    with pytest.raises(UserError, match=said):
        find_slice(name)


def test_every_name_is_found_under_itself():
    assert all(find_slice(name) == found and found.name == name for name, found in SLICES.items())
