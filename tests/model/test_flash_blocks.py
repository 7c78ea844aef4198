"""Which blocks of keys the kernels visit, and which of them they mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model import flash_blocks
from solar_jax.model.attention import attention_mask


def test_first_keys_are_the_starts_of_documents_or_of_the_window():
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1, 2]])
    assert flash_blocks.first_keys(ids, 0).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7]]
    assert flash_blocks.first_keys(ids, 2).tolist() == [[0, 0, 1, 3, 3, 4, 5, 7]]


@pytest.mark.parametrize("window", [0, 129])
def test_blocks_are_passed_over_masked_or_taken_whole_as_the_mask_of_plain_attention_says(window):
    block, blocks = 128, 4
    starts = np.array([[130, 380], [600, 600]])  # of documents; the second row has one
    ids = jnp.array((np.arange(block * blocks) >= starts[..., None]).sum(1), jnp.int32)
    seen = np.asarray(attention_mask(block * blocks, ids, window)).reshape(2, blocks, block, blocks, block)
    begin, whole = flash_blocks.visible_blocks(flash_blocks.first_keys(ids, window), block)
    for row in range(2):
        for query in range(blocks):
            edge, inner, diagonal = flash_blocks.edge_and_whole(begin[row, query], whole[row, query], query, blocks)
            assert diagonal == query
            for key in range(query):
                pair = seen[row, query, :, key]
                assert bool(pair.any()) == (key >= edge), (row, query, key)
                assert bool(pair.all()) == (key >= inner), (row, query, key)


def test_blocks_that_are_not_there_are_not_visited():
    # Of 4 blocks of keys; the queries' own block is later, then earlier than all of them.
    assert [int(x) for x in flash_blocks.edge_and_whole(-3, 1, 9, 4)] == [0, 1, 4]
    assert [int(x) for x in flash_blocks.edge_and_whole(-3, -2, -1, 4)] == [0, 0, 0]


def test_the_mask_of_a_block_is_that_of_plain_attention_whichever_way_it_lies():
    ids = jnp.array((np.arange(256) >= 100)[None], jnp.int32)
    first = flash_blocks.first_keys(ids, 70)
    expected = np.asarray(attention_mask(256, ids, 70)).reshape(256, 256)[128:, :128]
    found = flash_blocks.attends(first[0, 128:, None], 1, 0, 128, 0)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(flash_blocks.attends(first[:, 128:], 1, 0, 128, 1), expected.T)


@pytest.mark.parametrize(("length", "largest", "expected"), [(4096, 1024, 1024), (384, 1024, 384), (640, 512, 128)])
def test_a_block_divides_the_row(length, largest, expected):
    assert flash_blocks.block_size(length, largest) == expected
