"""Concatenated documents cut into rows: a small case by hand, and that no token is lost or counted twice."""

import numpy as np
import pytest

from solar_jax.data.packing import Rows, pack
from solar_jax.data.sources import Document
from tests.conftest import byte_tokenizer

EOS = 2


def ids(text: str) -> list[int]:
    """Byte tokens, with | for the end of a document."""
    tokenizer = byte_tokenizer()
    return [EOS if c == "|" else tokenizer.token_to_id(c) for c in text]


def starts(rows: Rows) -> list[int]:
    """Where the documents of the stream begin: at its start and after every end."""
    return [0, *(np.flatnonzero(rows.stream == EOS)[:-1] + 1)]


def concat(texts: list[str], length: int, mask_documents: bool) -> Rows:
    documents = [Document(f"file:{i}", text) for i, text in enumerate(texts, 1)]
    return pack(documents, byte_tokenizer(), EOS, length, packing="concat", mask_documents=mask_documents)


def random_rows(mask_documents: bool, length: int = 16) -> Rows:
    """Documents of 1 to 39 tokens, so that some end at a row's border and some span several rows."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef"), n)) for n in rng.integers(0, 39, 60)]
    return concat(texts, length, mask_documents)


def test_three_short_documents_by_hand():
    # place      0 1 2 3 | 4 5 6 7 | 8 9
    # token      a b | c | . d e f | g .      with . for the end of a document, which belongs to it
    rows = concat(["ab", "c", "defg"], 4, mask_documents=True)
    assert rows.stream.tolist() == ids("ab|c|defg|")
    assert starts(rows) == [0, 3, 5]
    assert len(rows) == 2
    assert [rows.documents(i) for i in range(2)] == [["file:1", "file:2"], ["file:2", "file:3"]]
    first, second = rows[0], rows[1]
    assert first["tokens"].tolist() == ids("ab|c")
    assert first["targets"].tolist() == ids("b|c|")
    assert first["positions"].tolist() == [0, 1, 2, 0]
    assert first["segment_ids"].tolist() == [0, 0, 0, 1]
    assert first["weights"].tolist() == [1, 1, 0, 1]  # the end of "ab" does not predict the "c"
    assert second["tokens"].tolist() == ids("|def")
    assert second["targets"].tolist() == ids("defg")
    assert second["positions"].tolist() == [0, 0, 1, 2]  # what is left of "c" begins the row
    assert second["segment_ids"].tolist() == [0, 1, 1, 1]
    assert second["weights"].tolist() == [0, 1, 1, 1]


def test_without_masking_a_row_is_one_document():
    rows = concat(["ab", "c", "defg"], 4, mask_documents=False)
    for i, text in enumerate(("ab|c|", "|defg")):
        assert rows[i]["tokens"].tolist() == ids(text)[:-1]
        assert rows[i]["targets"].tolist() == ids(text)[1:]
        assert rows[i]["positions"].tolist() == [0, 1, 2, 3]
        assert rows[i]["segment_ids"].tolist() == [0, 0, 0, 0]
        assert rows[i]["weights"].tolist() == [1, 1, 1, 1]


def test_a_document_as_long_as_a_row_ends_at_its_border():
    rows = concat(["abc", "def", "g"], 4, mask_documents=True)
    assert [rows[i]["segment_ids"].tolist() for i in range(2)] == [[0] * 4, [0] * 4]
    assert [rows[i]["positions"].tolist() for i in range(2)] == [[0, 1, 2, 3]] * 2
    assert [rows[i]["weights"].tolist() for i in range(2)] == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize("mask_documents", [True, False])
def test_every_token_but_the_first_and_the_last_few_is_a_target_exactly_once(mask_documents):
    rows = random_rows(mask_documents)
    targets = np.concatenate([rows[i]["targets"] for i in range(len(rows))])
    # Only the very first token and the rest that fills no row are never asked for.
    np.testing.assert_array_equal(targets, rows.stream[1 : 1 + len(rows) * 16])
    assert len(rows.stream) - 1 - len(targets) < 16
    tokens = np.concatenate([rows[i]["tokens"] for i in range(len(rows))])
    np.testing.assert_array_equal(tokens[1:], targets[:-1])  # and each target is the next row's or place's token


def test_masking_leaves_out_the_first_token_of_each_document_and_no_other():
    rows = random_rows(mask_documents=True)
    weights = np.concatenate([rows[i]["weights"] for i in range(len(rows))])
    first_of_document = np.zeros(len(rows.stream), bool)
    first_of_document[starts(rows)] = True
    np.testing.assert_array_equal(weights == 0, first_of_document[1 : 1 + len(weights)])


def test_each_document_of_a_row_has_its_own_number_and_counts_from_its_first_token_there():
    rows = random_rows(mask_documents=True)
    ended = 0
    for i in range(len(rows)):
        row, segment, position = rows[i], 0, 0
        for place in range(16):
            assert (row["segment_ids"][place], row["positions"][place]) == (segment, position), (i, place)
            position += 1
            if row["tokens"][place] == EOS:
                segment, position, ended = segment + 1, 0, ended + 1
    assert ended > 30  # the loop above saw borders


def test_a_row_is_the_same_whatever_was_read_before():
    rows, fresh = random_rows(mask_documents=True), random_rows(mask_documents=True)
    in_order = [rows[i] for i in range(len(rows))]
    for i in np.random.default_rng(1).permutation(len(rows)):
        for name, value in fresh[i].items():
            np.testing.assert_array_equal(value, in_order[i][name])


@pytest.mark.parametrize("mask_documents", [True, False])
def test_the_number_of_targets_is_that_of_the_weights(mask_documents):
    rows = random_rows(mask_documents)
    assert rows.tokens == sum(int(rows[i]["weights"].sum()) for i in range(len(rows)))


def test_rows_have_the_declared_types():
    row = random_rows(mask_documents=True)[3]
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == {
        "tokens": ((16,), "int32"),
        "targets": ((16,), "int32"),
        "positions": ((16,), "int32"),
        "segment_ids": ((16,), "int32"),
        "weights": ((16,), "float32"),
    }


def test_many_documents_keep_their_order_and_ends():
    # More than are encoded at a time.
    texts = [f"{i}" for i in range(700)]
    rows = concat(texts, 8, mask_documents=True)
    assert rows.stream.tolist() == ids("".join(t + "|" for t in texts))
    assert starts(rows) == [0, *np.cumsum([len(t) + 1 for t in texts])[:-1]]


@pytest.mark.parametrize(("text", "expected"), [(None, 0), ("", 0), ("abc", 0), ("abcd", 1), ("abcdefg", 1)])
def test_a_row_needs_one_token_more_than_its_length(text, expected):
    # The last token of a row still needs its target: 4 + 1 with the end of the document counted.
    assert len(concat([] if text is None else [text], 4, mask_documents=True)) == expected
