"""Text in: every kind of file read in a fixed order, split without overlap, and damage told by file and line."""

import gzip
import hashlib
import json
import pathlib
from pydoc_data.topics import topics

import pytest

from solar_jax.data.embedded import TOPICS
from solar_jax.data.sources import (
    Document,
    Source,
    choice,
    documents,
    is_held_out,
    parse_sources,
    part,
    split,
)
from solar_jax.errors import UserError


def read(path: pathlib.Path | str, text_key: str = "text") -> list[str]:
    return [d.text for d in documents(Source(str(path), text_key=text_key))]


def write(file: pathlib.Path, content: str | bytes) -> pathlib.Path:
    """A file, compressed where its name says so."""
    content = content.encode() if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def jsonl(*texts: str, key: str = "text") -> str:
    return "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md", "a"])
def test_any_other_file_is_one_document_of_text(tmp_path, name):
    assert read(write(tmp_path / name, "first line\n\nzweite Zeile: äöü\n")) == ["first line\n\nzweite Zeile: äöü\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_is_a_document_a_record_in_order(tmp_path, name):
    content = jsonl("b\nwith a break", "a", "ü") + "\n" + jsonl("after an empty line")
    assert read(write(tmp_path / name, content)) == ["b\nwith a break", "a", "ü", "after an empty line"]


def test_jsonl_text_is_taken_from_the_named_field(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl("x", "y", key="content"))
    assert read(file, "content") == ["x", "y"]


def test_a_folder_is_read_by_name_without_hidden_files(tmp_path):
    for name in ("b.txt", "a.md", "c/d.txt.gz", ".hidden", ".git/e.txt"):
        write(tmp_path / name, f"from {name}")
    assert read(tmp_path) == ["from a.md", "from b.txt", "from c/d.txt.gz"]


def test_a_pattern_is_read_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "d/e.txt"]


def test_a_source_is_read_the_same_twice(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i}.txt", str(i))
    assert read(tmp_path) == read(tmp_path)


def test_the_embedded_corpus_is_pythons_topics_by_name():
    assert read(TOPICS) == [topics[name] for name in sorted(topics)]


def parts(path: pathlib.Path | str, every: int, rule: str) -> tuple[list[str], list[str]]:
    """The texts of both parts."""
    source = Source(str(path))
    how = split(source, every, rule)
    training, heldout = ([d.text for d in part(source, how, held_out)] for held_out in (False, True))
    return training, heldout


def test_every_eighth_topic_is_held_out_from_the_first_on():
    names = sorted(topics)
    training, heldout = parts(TOPICS, 8, "position")
    assert heldout == [topics[name] for name in names[0::8]]
    assert training == [topics[name] for i, name in enumerate(names) if i % 8 != 0]
    assert len(training) + len(heldout) == len(names)


def test_a_split_by_place_of_as_many_documents_as_the_step_holds_one_out(tmp_path):
    texts = [str(i) for i in range(8)]
    assert parts(write(tmp_path / "a.jsonl", jsonl(*texts)), 8, "position") == (texts[1:], ["0"])


@pytest.mark.parametrize("rule", ["hash", "position"])
def test_a_source_of_few_documents_is_cut_by_characters(tmp_path, rule):
    # Without this a single text file would have nothing to evaluate on, or nothing to train on.
    long, short = "0123456789" * 8, "abcdefgh"
    training, heldout = parts(write(tmp_path / "a.jsonl", jsonl(long, short)), 8, rule)
    assert training == [long[:70], "abcdefg"]
    assert heldout == [long[70:], "h"]


def test_by_hash_a_text_is_on_the_same_side_wherever_it_stands(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    training, heldout = parts(write(tmp_path / "a.jsonl", jsonl(*texts)), 8, "hash")
    assert sorted(training + heldout) == sorted(texts)
    assert 90 < len(heldout) < 160  # 125 expected, with a standard deviation of 10
    again = parts(write(tmp_path / "b.jsonl", jsonl(*texts[::-1], "another")), 8, "hash")
    assert set(again[1]) - {"another"} == set(heldout)
    by_place = parts(tmp_path / "b.jsonl", 8, "position")
    assert set(by_place[1]) - {"another"} != set(heldout)  # which is not so by place


def test_by_hash_the_held_out_texts_are_those_that_the_stated_hash_says(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    expected = [
        t for t in texts if int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "big") < 2**64 // 8
    ]
    assert parts(write(tmp_path / "a.jsonl", jsonl(*texts)), 8, "hash")[1] == expected
    assert [t for t in texts if is_held_out(Document("", t), 8)] == expected


@pytest.mark.parametrize(("count", "held_out"), [(8, 1), (9, 2), (63, 8)])
def test_by_hash_a_small_source_still_has_both_parts(tmp_path, count, held_out):
    texts = [f"document {i}" for i in range(count)]
    training, heldout = parts(write(tmp_path / "a.jsonl", jsonl(*texts)), 8, "hash")
    assert (len(training), len(heldout)) == (count - held_out, held_out)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("corpus.txt", ("corpus.txt", 1.0)),
        ("corpus.txt:3", ("corpus.txt", 3.0)),
        ("corpus.txt:0.25", ("corpus.txt", 0.25)),
        ("corpus.txt:.5", ("corpus.txt", 0.5)),
        ("pydoc-topics:2", ("pydoc-topics", 2.0)),
        ("/data/a:b/c.txt", ("/data/a:b/c.txt", 1.0)),  # a colon within a path is no weight
        ("/data/*.jsonl.gz:10", ("/data/*.jsonl.gz", 10.0)),
    ],
)
def test_a_weight_is_what_follows_the_last_colon(entry, expected):
    (source,) = parse_sources((entry,))
    assert (source.path, source.weight) == expected


@pytest.mark.parametrize(("entry", "found"), [("a.txt:0", "a.txt must be above 0, found 0"), ("", "found ''")])
def test_an_entry_without_a_path_or_share_is_refused(entry, found):
    with pytest.raises(UserError, match=found):
        parse_sources((entry,))


def refusal(path: pathlib.Path | str, text_key: str = "text") -> str:
    with pytest.raises(UserError) as e:
        read(path, text_key)
    return str(e.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_broken_json_line_is_told_by_file_and_line(tmp_path, name):
    file = write(tmp_path / name, jsonl("x", "y") + '{"text": "cut sho\n' + jsonl("z"))
    assert refusal(file).startswith(f"{file}:3: is not JSON")


def test_a_missing_field_is_told_by_file_line_key_and_what_is_there(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl("x") + '{"body": "y", "id": 1}\n')
    found = refusal(file)
    assert found.startswith(f"{file}:2: must hold text under 'text' (config.data.text_key or ?text=)")
    assert "['body', 'id']" in found


@pytest.mark.parametrize(("line", "found"), [('["x"]', "list"), ('{"text": 3}', "text"), ('{"text": [null]}', "text")])
def test_a_record_that_holds_no_text_is_told_by_file_and_line(tmp_path, line, found):
    file = write(tmp_path / "a.jsonl", jsonl("x") + line + "\n")
    message = refusal(file)
    assert message.startswith(f"{file}:2: must hold text under 'text'")
    assert found in message


def test_text_that_is_not_utf8_is_told_by_file_and_byte(tmp_path):
    file = write(tmp_path / "a.txt", b"caf\xe9 au lait")
    assert refusal(file) == f"{file}: is not UTF-8 text: invalid continuation byte at byte 3."


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_record_that_is_not_utf8_is_told_by_file_and_line(tmp_path, name):
    # Beyond the first read of some 8 KiB, where a byte number counted by the decoder would be of that read.
    file = write(tmp_path / name, jsonl(*["x" * 100] * 200).encode() + b'{"text": "caf\xe9"}\n')
    assert refusal(file).startswith(f"{file}:201: is not UTF-8 text")


def test_a_record_with_half_a_character_is_told_by_file_and_line(tmp_path):
    # JSON can write one half of a surrogate pair, which is no text that a tokenizer takes.
    file = write(tmp_path / "a.jsonl", jsonl("x") + '{"text": "half \\ud83d"}\n')
    assert refusal(file).startswith(f"{file}:2: ")


def test_a_missing_file_is_told_by_key_and_path(tmp_path):
    path = tmp_path / "nowhere.txt"
    assert refusal(path) == f"config.data.sources: {path}: no such file, folder or pattern."


def test_a_folder_without_files_is_not_called_missing(tmp_path):
    found = refusal(tmp_path)
    assert str(tmp_path) in found
    assert "no such" not in found


def test_a_truncated_gz_is_told_by_file(tmp_path):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"some text " * 100)[:-12])
    assert refusal(file).startswith(f"{file}: cannot be read: ")


def test_a_damaged_gz_is_told_by_file(tmp_path):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"some text " * 100)[:10] + b"\xff" * 40)  # a good header, no deflate stream
    assert refusal(file).startswith(f"{file}: cannot be read: ")


def test_a_file_that_only_claims_to_be_gz_is_told_by_file(tmp_path):
    file = tmp_path / "a.txt.gz"
    file.write_text("plain text")
    assert refusal(file).startswith(f"{file}: cannot be read: ")


def test_what_is_read_of_a_folder_and_what_is_left_out_is_said(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl.gz", "README.md", "LICENSE", "notes/a.txt"):
        write(tmp_path / name, jsonl("x") if "json" in name else "x")
    expected = f"{tmp_path}: 2 file(s) of .jsonl; left out: LICENSE, README.md, notes/a.txt"
    assert choice(Source(str(tmp_path))) == expected
    unnamed = write(tmp_path / "b" / "wiki_00", "x").parent
    assert choice(Source(str(unnamed))).endswith(
        "1 file(s) of no ending, taken as plain text, although not all endings say so"
    )
    assert "taken" not in choice(Source(str(tmp_path / "notes")))


@pytest.mark.parametrize("line", ['{"text": ""}', '{"text": null}'])
def test_documents_without_text_are_counted_or_refused_by_key(tmp_path, line):
    file = write(tmp_path / "a.jsonl", jsonl("x") + line + "\n" + jsonl("y"))
    skipped: list[None] = []
    found = documents(Source(str(file)), lambda: skipped.append(None))
    assert [d.text for d in found] == ["x", "y"]
    assert len(skipped) == 1
    with pytest.raises(UserError) as e:
        list(documents(parse_sources((str(file),), skip_empty=False)[0]))
    assert str(e.value) == f"{file}:2: has no text; config.data.skip_empty=True skips such documents."
