"""Rows as records: what goes in comes out, and ids are told in two numbers."""

import numpy as np
import pytest

from solar_jax.data.prepared import records
from tests.conftest import byte_tokenizer


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_a_record_holds_what_it_was_made_of(vocabulary, dtype):
    assert records.token_dtype(vocabulary) == dtype
    tokens = np.array([5, 0, vocabulary - 1, 7], np.int32)
    sizes, places = np.array([3, 1]), np.array([[0, 1 << 40], [70000, records.WHOLE_FILE]])
    data = records.encode((tokens, sizes, places), dtype)
    # A count; of each piece its size, file and record; the tokens.
    assert len(data) == 4 + 2 * (4 + 4 + 8) + 4 * int(dtype[-1])
    pieces, trained = records.decode(data, dtype)
    for found, expected in zip(pieces, (tokens, sizes, places), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert trained is None


def test_a_record_of_a_conversation_says_what_is_trained():
    pieces = np.arange(11), np.array([4, 7]), np.array([[0, 0], [0, 1]])
    trained = np.array([0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1], bool)
    data = records.encode(pieces, "<u2", trained)
    found, marks = records.decode(data, "<u2", marked=True)
    np.testing.assert_array_equal(found[0], pieces[0])
    np.testing.assert_array_equal(marks, trained)
    with pytest.raises(ValueError, match="the sizes sum to 11 tokens"):  # read as text it is refused, not misread
        records.decode(data, "<u2")


def test_a_record_that_lacks_tokens_is_no_record():
    data = records.encode((np.arange(4), np.array([4]), np.array([[0, 0]])), "<u2")
    with pytest.raises(ValueError, match="the sizes sum to 4 tokens, found 6 bytes"):
        records.decode(data[:-2], "<u2")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("a/b.jsonl:12", ("a/b.jsonl", 12)),
        ("gs://b/c.parquet:0", ("gs://b/c.parquet", 0)),
        ("a.txt", ("a.txt", records.WHOLE_FILE)),
        ("pydoc-topics:if", ("pydoc-topics:if", records.WHOLE_FILE)),
        ("a:007", ("a:007", records.WHOLE_FILE)),  # "a:7" is another id
        ("a:1:2", ("a:1", 2)),
        (":3", (":3", records.WHOLE_FILE)),
    ],
)
def test_an_id_is_a_file_and_a_number_and_back(document, expected):
    assert records.place(document) == expected
    assert records.name(*expected) == document


def test_the_hash_of_a_tokenizer_is_of_all_that_decides_tokens():
    first = records.tokenizer_hash(byte_tokenizer(), 2)
    assert records.tokenizer_hash(byte_tokenizer(), 2) == first
    assert records.tokenizer_hash(byte_tokenizer(), 1) != first
    other = byte_tokenizer()
    other.add_tokens(["ab"])
    assert records.tokenizer_hash(other, 2) != first
