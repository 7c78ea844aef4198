"""Bad inputs, each with what is said of it. `python -m tests.data.test_bad_inputs` prints them as a table."""

import contextlib
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from solar_jax.data.sources import documents, parse_sources, split
from solar_jax.errors import UserError

GOOD = "".join(json.dumps({"text": f"good {i}", "id": i}) + "\n" for i in range(3)).encode()


def file(name: str, content: bytes = b"", kind: str = "") -> Callable[[pathlib.Path], str]:
    """Writes a file, compressed where its name says so, or cut to half of itself."""

    def make(folder: pathlib.Path) -> str:
        data = {".gz": gzip.compress, ".zst": lambda x: pa.compress(x, "zstd", asbytes=True)}.get(
            pathlib.Path(name).suffix if kind != "as it is" else "", lambda x: x
        )(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data[: len(data) // 2] if kind == "half" else data)
        return str(folder / name)

    return make


def table(name: str, columns: dict, half: bool = False) -> Callable[[pathlib.Path], str]:
    def make(folder: pathlib.Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = pa.table(columns)
        if path.suffix == ".parquet":
            pq.write_table(found, path)
        else:
            with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, found.schema) as writer:
                writer.write_table(found, max_chunksize=2)
        if half:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return str(path)

    return make


def records(name: str, *contents: bytes, half: bool = False) -> Callable[[pathlib.Path], str]:
    def make(folder: pathlib.Path) -> str:
        path = folder / name
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for content in contents:
            writer.write(content)
        writer.close()
        if half:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return str(path)

    return make


def folder_of(*makers: Callable[[pathlib.Path], str]) -> Callable[[pathlib.Path], str]:
    def make(folder: pathlib.Path) -> str:
        for maker in makers:
            maker(folder)
        return str(folder)

    return make


def named(text: str) -> Callable[[pathlib.Path], str]:
    return lambda folder: f"{folder}/{text}"


def with_options(maker: Callable[[pathlib.Path], str], options: str) -> Callable[[pathlib.Path], str]:
    return lambda folder: maker(folder) + options


def many(text: str) -> list[str]:
    return [f"{text} {i}" for i in range(200)]


# what it is -> (how it is made, what is said of it, without the folder's name; a number: the documents that are read)
CASES: dict[str, tuple[Callable[[pathlib.Path], str], str | int]] = {
    # ---- nothing there
    "empty text file": (file("a.txt"), "a.txt: holds no text, or only empty documents."),
    "empty JSONL": (file("a.jsonl"), "a.jsonl: holds no text, or only empty documents."),
    "JSONL of blank lines": (file("a.jsonl", b"\n \n\n"), "a.jsonl: holds no text"),
    "gz of nothing": (file("a.jsonl.gz"), "a.jsonl.gz: holds no text"),
    "gz file of 0 bytes": (file("a.txt.gz", kind="as it is"), "a.txt.gz: holds no text"),
    "zst file of 0 bytes": (file("a.txt.zst", kind="as it is"), "a.txt.zst: holds no text"),
    "Parquet file of 0 bytes": (file("a.parquet"), "a.parquet: cannot be read: Parquet file size is 0 bytes."),
    "Arrow file of 0 bytes": (file("a.arrow"), "a.arrow: cannot be read: Tried reading schema message"),
    "ArrayRecord file of 0 bytes": (file("a.array_record"), "a.array_record: must hold records, found an empty file."),
    "Parquet without rows": (table("a.parquet", {"text": pa.array([], pa.string())}), "a.parquet: holds no text"),
    "empty folder": (folder_of(), "must hold files of text, found an empty folder."),
    "folder of hidden files": (folder_of(file(".a", b"x")), "must hold files of text, found an empty folder."),
    "folder of empty files": (folder_of(file("a.txt"), file("b.txt")), "holds no text, or only empty documents."),
    "no such file": (named("no.txt"), "no.txt: no such file, folder or pattern."),
    "pattern that fits nothing": (named("*.jsonl"), "*.jsonl: no such file, folder or pattern."),
    "place of an unknown kind": (lambda _: "ftpx://a/b", "ftpx://a/b: ftpx:// is not a supported protocol."),
    "documents without text among others": (file("a.jsonl", b'{"text": ""}\n' + GOOD + b'{"text": ""}'), 3),
    # ---- records that are none
    "broken JSON line": (file("a.jsonl", GOOD + b'{"text": "cut sho\n'), "a.jsonl:4: is not JSON: Invalid control"),
    "last line cut": (file("a.jsonl.gz", GOOD + b'{"te'), "a.jsonl.gz:4: is not JSON"),
    "JSON list, not lines": (file("a.jsonl", b'[{"text": "a"}]'), "a.jsonl:1: must hold text under 'text' "),
    "nesting without end": (file("a.jsonl", b"[" * 200_000), "a.jsonl:1: is not JSON: "),
    "another key": (file("a.jsonl", b'{"body": "x"}'), "(config.data.text_key or ?text=), found ['body']."),
    "null among others": (file("a.jsonl", GOOD + b'{"text": null}'), 3),
    "nulls alone": (file("a.jsonl", b'{"text": null}'), "a.jsonl: holds no text, or only empty documents."),
    "number": (file("a.jsonl", b'{"text": 3}'), "found ['text'] with int there."),
    "half a surrogate pair": (file("a.jsonl", b'{"text": "\\ud83d"}'), "a.jsonl:1: the text under 'text' has a lone"),
    "another column": (table("a.parquet", {"body": ["x"], "n": [1]}), "a.parquet: must have a column 'text' (config."),
    "another column by ?text=": (
        with_options(table("a.parquet", {"body": ["x"]}), "?text=words"),
        "a.parquet: must have a column 'words' (config.data.text_key or ?text=), found ['body'].",
    ),
    "column of numbers": (table("a.parquet", {"text": [1]}), "a.parquet: the column 'text' must hold text, found int"),
    "column of bytes": (table("a.arrow", {"text": [b"x"]}), "a.arrow: the column 'text' must hold text, found binary."),
    "column of lists": (table("a.parquet", {"text": [["x"]]}), "a.parquet: the column 'text' must hold text, found"),
    "null in a column": (table("a.parquet", {"text": ["x", None]}), 1),
    "column of maps of strings": (
        table("a.parquet", {"text": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))}),
        "a.parquet: the column 'text' must hold text, found map<string, string",
    ),
    "column of structs of strings": (
        table("a.parquet", {"text": [{"string": "x"}]}),
        "a.parquet: the column 'text' must hold text, found struct<string: string>.",
    ),
    "column of codes for numbers": (
        table("a.arrow", {"text": pa.array([1, 2]).dictionary_encode()}),
        "a.arrow: the column 'text' must hold text, found dictionary<values=int64",
    ),
    "column of nulls": (table("a.parquet", {"text": pa.nulls(2)}), "the column 'text' must hold text, found null."),
    # ---- JSON
    "JSON array": (file("a.json", b' [{"text": "a"},\n{"text": "b"}]\n'), 2),
    "JSON array with a mark in front, gz": (file("a.json.gz", b'\xef\xbb\xbf[{"text": "a"}]'), 1),
    "JSON lines named .json": (file("a.json", GOOD), 3),
    "JSON object over several lines": (file("a.json", json.dumps({"text": "a"}, indent=1).encode()), 1),
    "JSON array of a megabyte and more": (
        file("a.json.zst", json.dumps([{"text": "word " * 999, "n": i} for i in range(999)]).encode()), 999,
    ),
    "JSON object of columns": (file("a.json", b'{"text": ["a", "b"]}'), "a.json:0: must hold text under 'text' "),
    "JSON object with the records inside": (file("a.json", b'{"data": [{"text": "a"}]}'), "found ['data']."),
    "JSON array of strings": (file("a.json", b'["a"]'), "a.json:0: must hold text under 'text' (config.data.text_key"),
    "JSON array cut short": (file("a.json", b'[{"text": "a"}, {"te'), "a.json:1: is not JSON: Unterminated string"),
    "JSON array without its end": (file("a.json", b'[{"text": "a"}'), "its array is cut short after 1 records."),
    "JSON array and more": (file("a.json", b'[{"text": "a"}] {"text": "b"}'), "something follows its array."),
    "JSON in UTF-16": (file("a.json", '[{"text": "a"}]'.encode("utf-16")), "a.json: is not UTF-8 text: it starts with"),
    "JSON of nothing": (file("a.json"), "a.json: holds no text, or only empty documents."),
    # ---- files whose syntax is not text
    "CSV": (file("a.csv", b"text\nx\n"), "a.csv: is a table, and its syntax would become text; convert it to Parquet"),
    "TSV, gz": (file("a.tsv.gz", b"text\nx\n"), "a.tsv.gz: is a table"),
    "YAML": (file("a.yaml", b"text: x"), "a.yaml: is markup, and its syntax would become text; extract the text first"),
    "HTML in a folder": (folder_of(file("a.html", b"<p>x</p>"), file("b.htm", b"x")), "a.html: is markup"),
    "HTML asked for as text": (with_options(file("a.html", b"<p>x</p>"), "?as=text"), 1),
    "read as something else": (with_options(file("a.html", b"x"), "?as=html"), "as must be text, found 'html'."),
    "PDF": (file("a.pdf", b"%PDF-1.4"), "a.pdf: is not plain text; extract the text"),
    "text compressed by bzip2": (file("a.txt.bz2", b"BZh9"), "a.txt.bz2: is compressed in a way that is not read"),
    "ArrayRecord, JSON then not": (records("a.array_record", b'{"text": "x"}', b"x"), "a.array_record:1: is not JSON"),
    "ArrayRecord of other keys": (records("a.array_record", b'{"body": "x"}'), "a.array_record:0: must hold text"),
    # ---- encodings
    "Latin-1 within UTF-8": (file("a.txt", b"caf\xc3\xa9 caf\xe9"), "a.txt: is not UTF-8 text: unexpected end"),
    "Latin-1 line within JSONL": (file("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD), "a.jsonl:4: is not UTF-8"),
    "UTF-16": (file("a.txt", "text".encode("utf-16")), "a.txt: is not UTF-8 text: it starts with a UTF-16 BOM."),
    "UTF-16 JSONL": (file("a.jsonl", '{"text": "x"}'.encode("utf-16")), "a.jsonl:1: is not UTF-8 text: it starts with"),
    "UTF-8 with a mark in front": (file("a.txt", b"\xef\xbb\xbftext"), 1),
    "UTF-8 JSONL with a mark in front": (file("a.jsonl", b"\xef\xbb\xbf" + GOOD), 3),
    "NUL at the start": (file("a.txt", b"\0text"), "a.txt: is not text: it has a NUL at character 0."),
    "NUL within JSONL": (file("a.jsonl", GOOD + b"\0\0\0\0\n"), "a.jsonl:4: is not text: it has a NUL at"),
    "picture in a folder of text": (folder_of(file("a.txt", b"text"), file("b.png", b"\x89PNG\r\n\x1a\n\0\0")), 1),
    "picture": (file("b.png", b"\x89PNG\r\n\x1a\n\0\0"), "b.png: is not UTF-8 text: invalid start byte at byte 0."),
    "ArrayRecord of bytes": (records("a.array_record", b"text", b"\xff\xfe"), "a.array_record:1: is not UTF-8 text"),
    # ---- damage
    "gz cut in half": (file("a.jsonl.gz", GOOD * 999, "half"), "a.jsonl.gz: cannot be read"),
    "gz that is none": (file("a.txt.gz", b"text", "as it is"), "a.txt.gz: cannot be read: Not a gzipped file"),
    "zst cut in half": (file("a.jsonl.zst", GOOD * 999, "half"), "a.jsonl.zst: cannot be read: Truncated compressed"),
    "zst that is none": (file("a.txt.zst", b"text", "as it is"), "a.txt.zst: cannot be read: ZSTD decompress failed"),
    "Parquet cut in half": (table("a.parquet", {"text": many("x")}, half=True), "a.parquet: cannot be read: Parquet"),
    "Parquet that is none": (file("a.parquet", b"text" * 9), "a.parquet: cannot be read: Parquet magic bytes"),
    "Arrow cut in half": (table("a.arrow", {"text": many("x")}, half=True), "a.arrow: cannot be read after record "),
    "ArrayRecord cut in half": (
        records("a.array_record", *(b"some text" for _ in range(99)), half=True),
        "a.array_record: has no records; it is cut short, or not an ArrayRecord file.",
    ),
    "ArrayRecord that is none": (file("a.array_record", b"text" * 99), "a.array_record: has no records;"),
    # ---- data sets
    "several splits, saved by datasets": (
        folder_of(file("dataset_dict.json", b'{"splits": ["train", "test"]}')),
        "holds the splits train, test; name one, as in ",
    ),
    "several splits of Parquet": (
        folder_of(table("data/train-0.parquet", {"text": ["x"]}), table("data/test-0.parquet", {"text": ["x"]})),
        "holds the splits test, train; name one by a pattern, as in ",
    ),
    "several splits of JSONL beside a README": (
        folder_of(file("train.jsonl", GOOD), file("test.jsonl", GOOD), file("README.md", b"x")),
        "holds the splits test, train; name one by a pattern, as in ",
    ),
    "several splits of text": (
        folder_of(file("wiki.train.txt", b"x"), file("wiki.valid.txt", b"x")),
        "holds the splits train, valid; name one by a pattern, as in ",
    ),
    "one split beside README, licence and settings": (
        folder_of(file("train.jsonl", GOOD), file("README.md", b"x"), file("LICENSE", b"x"), file("a.json", b"{}")),
        3,
    ),
    "text beside README and licence": (
        folder_of(file("a.txt", b"x"), file("README.md", b"x"), file("LICENSE", b"x")), 1,
    ),
    "a README alone": (folder_of(file("README.md", b"x")), 1),
    "files without an ending": (folder_of(file("wiki_00", b"x"), file("wiki_01", b"x"), file("a.csv", b"x")), 2),
    "a file of the data set is missing": (
        folder_of(file("state.json", b'{"_data_files": [{"filename": "data-0.arrow"}]}')),
        "state.json: lists data-0.arrow, which is missing.",
    ),
    "state.json of another kind": (folder_of(file("state.json", b"[]")), "state.json: must be JSON with the key "),
    # ---- entries
    "unknown option": (with_options(file("a.txt", b"x"), "?txet=a"), "one of text, epochs, limit, as, found 'txet'."),
    "no epochs": (with_options(file("a.txt", b"x"), "?epochs=0"), "a.txt: epochs must be a number above 0, found '0'."),
    "limit that is no number": (with_options(file("a.txt", b"x"), "?limit=all"), "limit must be a number of tokens"),
    "weight of 0": (with_options(file("a.txt", b"x"), ":0"), "a.txt must be above 0, found 0."),
    # ---- unusual, and read
    "ids that occur twice": (file("a.jsonl", GOOD + GOOD), 6),
    "a line of 100 MB": (file("a.jsonl", b'{"text": "' + b"word " * 20_000_000 + b'"}\n' + GOOD), 4),
    "a text of 100 MB in one line": (file("a.txt", b"word " * 20_000_000), 1),
    "no line feed at the end": (file("a.jsonl", GOOD.rstrip()), 3),
    "lines of Windows": (file("a.jsonl", GOOD.replace(b"\n", b"\r\n")), 3),
}  # fmt: skip


def outcome(make: Callable[[pathlib.Path], str], folder: pathlib.Path) -> str | int:
    """The sentence without the folder's name, or how many documents are read."""
    try:
        (source,) = parse_sources((make(folder),))
        split(source, 8, "hash")
        found = list(documents(source))
        assert len({d.id for d in found}) == len(found)
        return len(found)
    except UserError as e:
        return str(e).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


@pytest.mark.parametrize("what", CASES)
def test_a_bad_input_is_told_by_file_record_and_column(tmp_path, what):
    make, expected = CASES[what]
    found = outcome(make, tmp_path)
    if isinstance(expected, int):
        assert found == expected
    else:
        assert expected in str(found)
        assert "\n" not in str(found)


def test_a_source_that_is_listed_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt is listed twice; list it once, with the sum of the weights"):
        parse_sources((f"{tmp_path}/a.txt:2", f"{tmp_path}/a.txt"))
    assert len(parse_sources((f"{tmp_path}/a.jsonl?text=question", f"{tmp_path}/a.jsonl?text=answer"))) == 2


if __name__ == "__main__":
    for name, (maker, _) in CASES.items():
        with tempfile.TemporaryDirectory() as place, contextlib.suppress(BrokenPipeError):
            said = outcome(maker, pathlib.Path(place))
            print(f"| {name} | {f'{said} document(s)' if isinstance(said, int) else said} |")
