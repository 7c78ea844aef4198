"""Best-fit packing: rows by hand, every token's own target, and the losses of documents that stand alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.config import ModelConfig
from solar_jax.data import packing
from solar_jax.data.packing import Rows, best_fit, pack
from solar_jax.data.sources import Document
from solar_jax.model import llama
from tests.conftest import byte_tokenizer

EOS = 2


def ids(text: str) -> list[int]:
    """Byte tokens, with | for the end of a document and . for padding."""
    tokenizer = byte_tokenizer()
    return [{"|": EOS, ".": 0}.get(c, tokenizer.token_to_id(c)) for c in text]


def packed(texts: list[str], length: int) -> Rows:
    documents = [Document(f"file:{i}", text) for i, text in enumerate(texts, 1)]
    return pack(documents, byte_tokenizer(), EOS, length)


def random_texts(seed: int = 0, count: int = 80, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdef"), n)) for n in rng.integers(0, longest, count)]


def test_rows_by_hand():
    # Inputs 2, 5 = 4 + 1, 3, and none: the long piece alone, 3 + 1, and 2 with two places empty.
    rows = packed(["ab", "cdefg", "hij", ""], 4)
    assert len(rows) == 3
    found = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    assert found["tokens"] == [ids("ab.."), ids("cdef"), ids("ghij")]
    assert found["targets"] == [ids("b|.."), ids("defg"), ids("|ij|")]  # "f" still has its "g", of another row
    assert found["positions"] == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]]  # a later piece starts at 0
    assert found["segment_ids"] == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert found["weights"] == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert [rows.documents(i) for i in range(3)] == [["file:1"], ["file:2"], ["file:2", "file:3"]]
    assert rows.tokens == 10


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([6, 5, 4, 3, 2], [0, 1, 0, 1, 1]),  # 6 + 4; 5 + 3 + 2
        ([4, 6, 6, 4], [0, 1, 0, 1]),  # of equal rooms the newest
        ([7, 6, 3, 4, 10], [0, 1, 0, 1, 2]),
        ([5, 8, 2, 4], [0, 1, 1, 0]),  # the 2 goes where 2 are left, not where 5 are
        ([10, 10], [0, 1]),
        ([], []),
    ],
)
def test_a_piece_goes_where_it_leaves_the_least_room(sizes, expected):
    assert best_fit(np.array(sizes, np.int64), 10).tolist() == expected


def by_exhaustion(sizes: list[int], room: int) -> list[int]:
    """Best fit decreasing as its definition says, looking at every row for every piece."""
    rows: list[int] = []
    chosen = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [left for left in rows if left >= sizes[piece]]
        if not fits:
            rows.append(room)
            fits = [room]
        row = max(i for i, left in enumerate(rows) if left == min(fits))
        rows[row] -= sizes[piece]
        chosen[piece] = row
    return chosen


def test_as_many_rows_as_looking_at_every_row_gives_and_none_too_full():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 65, 200)
        rows = best_fit(sizes, 64)
        assert np.bincount(rows, sizes).max() <= 64
        assert sorted(np.bincount(rows, sizes)) == sorted(np.bincount(by_exhaustion(sizes.tolist(), 64), sizes))


def test_every_token_of_every_document_is_an_input_once_with_the_token_after_it_as_target():
    texts = random_texts()
    rows = packed(texts, 16)
    expected = sorted((a, b) for text in texts for encoded in [ids(text + "|")] for a, b in itertools.pairwise(encoded))
    found = []
    for row in rows:
        real = row["weights"] == 1
        assert EOS not in row["tokens"][real]
        assert set(row["segment_ids"][~real]).isdisjoint(row["segment_ids"][real])
        found += zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True)
    assert sorted(found) == expected
    assert rows.tokens == len(found)


def test_rows_do_not_depend_on_what_other_blocks_hold(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK_CHARACTERS", 1)
    monkeypatch.setattr(packing, "_ROWS_A_BLOCK", 4)
    texts = random_texts(count=200)
    documents = [Document(f"file:{i}", text) for i, text in enumerate(texts)]
    groups = list(packing.blocks(documents, 16))
    assert len(groups) > 10
    assert [d for group in groups for d in group] == documents
    alone = [row for group in groups for row in pack(group, byte_tokenizer(), EOS, 16)]
    together = pack(documents, byte_tokenizer(), EOS, 16)
    assert len(together) == len(alone)
    for row, expected in zip(together, alone, strict=True):
        for name, value in expected.items():
            np.testing.assert_array_equal(row[name], value)


def test_a_long_text_is_tokenised_in_parts_that_change_no_word(monkeypatch):
    text = "one two  three   four " * 20
    whole = packing.tokenise([text], byte_tokenizer(), EOS)[0]
    monkeypatch.setattr(packing, "_LONGEST_TEXT", 25)
    parts = list(packing._parts(text))
    assert len(parts) > 10
    assert "".join(parts) == text
    assert all(part[0] == " " and part[1] != " " for part in parts[1:])
    np.testing.assert_array_equal(packing.tokenise([text], byte_tokenizer(), EOS)[0], whole)
    assert list(packing._parts("x" * 60)) == ["x" * 25, "x" * 25, "x" * 10]  # no space to cut at


def losses(rows: Rows, segments: bool = True) -> dict[tuple[int, ...], float]:
    """The summed loss of every piece, by its tokens, from a tiny float32 model."""
    cfg = ModelConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rope_theta=1e4, rms_norm_eps=1e-5,
    )  # fmt: skip
    params = llama.initial_params(cfg, 0)
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)  # attention that looks somewhere
    batch = {name: jnp.array(np.stack([row[name] for row in rows])) for name in rows[0]}
    ids = batch["segment_ids"] if segments else None
    logits = llama.logits(cfg, params, batch["tokens"], batch["positions"], ids)
    each = np.array(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0])
    found = {}
    for i, row in enumerate(rows):
        for segment in set(row["segment_ids"][row["weights"] == 1]):
            of = row["segment_ids"] == segment
            found[tuple(row["tokens"][of])] = each[i][of].sum()
    return found


def test_a_packed_document_has_the_loss_it_has_alone():
    texts = [text for text in random_texts(1, count=24, longest=30) if text]
    together = losses(packed(texts, 32))
    assert len(together) == len(texts)
    alone = {}
    for text in texts:  # one row each
        alone |= losses(packed([text], 32))
    for tokens, expected in alone.items():
        assert abs(together[tokens] - expected) / len(tokens) < 1e-5
    # Without segment ids documents see those before them, and the same comparison finds it.
    mixed = losses(packed(texts, 32), segments=False)
    assert max(abs(mixed[tokens] - expected) / len(tokens) for tokens, expected in alone.items()) > 1e-3


def test_rows_of_natural_documents_are_98_percent_real():
    # Of the lengths of CPython's topics, some longer than a row.
    from pydoc_data.topics import topics

    rows = packed([topics[name] for name in sorted(topics)], 2048)
    assert rows.tokens / (len(rows) * 2048) > 0.98
