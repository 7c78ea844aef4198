"""Every format gives the same documents in the same order, a record at a time, from any place."""

import gzip
import json
import pathlib
import tracemalloc

import datasets
import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from fsspec.implementations.memory import MemoryFileSystem

from solar_jax.data.sources import Source, documents, parse_sources
from solar_jax.errors import UserError
from solar_jax.storage import retry

TEXTS = ["first\nof two lines", "zweite: äöü", *(f"document {i} with some words" for i in range(300)), "日本語"]
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(path: pathlib.Path | str, text_key: str = "text") -> list[str]:
    return [d.text for d in documents(Source(str(path), text_key=text_key))]


def table(texts: list[str]) -> pa.Table:
    return pa.table({"id": range(len(texts)), "text": texts})


def write_arrow(file: pathlib.Path, as_file: bool, column: pa.Array | None = None) -> None:
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    made = table(TEXTS) if column is None else table(TEXTS).set_column(1, "text", column)
    with pa.OSFile(str(file), "wb") as f, new(f, made.schema) as writer:
        writer.write_table(made, max_chunksize=7 if column is None else None)


def write_records(file: pathlib.Path, texts: list[str], as_json: bool) -> None:
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for text in texts:
        writer.write((json.dumps({"text": text}) if as_json else text).encode())
    writer.close()


# file name -> what writes TEXTS to it
FORMATS = {
    "a.jsonl": lambda f: f.write_bytes(JSONL),
    "a.ndjson": lambda f: f.write_bytes(JSONL),
    "a.jsonl.gz": lambda f: f.write_bytes(gzip.compress(JSONL)),
    "a.jsonl.zst": lambda f: f.write_bytes(pa.compress(JSONL, "zstd", asbytes=True)),
    "two frames.jsonl.zst": lambda f: f.write_bytes(
        b"".join(pa.compress(part, "zstd", asbytes=True) for part in (JSONL[:999], JSONL[999:]))
    ),
    "a.parquet": lambda f: pq.write_table(table(TEXTS), f, row_group_size=100),
    "large.parquet": lambda f: pq.write_table(table(TEXTS).cast(pa.schema({"id": "int64", "text": "large_utf8"})), f),
    "view.parquet": lambda f: pq.write_table(
        table(TEXTS).cast(pa.schema({"id": "int64", "text": pa.string_view()})), f
    ),
    "large codes.arrow": lambda f: write_arrow(f, True, pa.array(TEXTS, pa.large_string()).dictionary_encode()),
    "lines.json": lambda f: f.write_bytes(JSONL),
    "array.json": lambda f: f.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)])),
    "indented array.json.gz": lambda f: f.write_bytes(
        gzip.compress(json.dumps([{"text": t} for t in TEXTS], indent=2).encode())
    ),
    "codes.parquet": lambda f: pq.write_table(
        table(TEXTS).set_column(1, "text", pa.array(TEXTS).dictionary_encode()), f, use_dictionary=True
    ),
    "stream.arrow": lambda f: write_arrow(f, False),
    "file.arrow": lambda f: write_arrow(f, True),
    "text.array_record": lambda f: write_records(f, TEXTS, False),
    "json.array_record": lambda f: write_records(f, TEXTS, True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_records_in_order_with_their_place_as_id(tmp_path, name):
    FORMATS[name](tmp_path / name)
    found = list(documents(Source(str(tmp_path / name))))
    assert [d.text for d in found] == TEXTS
    first = 1 if ".jsonl" in name or ".ndjson" in name else 0  # lines count from 1, rows from 0
    assert [d.id for d in found] == [f"{tmp_path / name}:{first + i}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_elsewhere_as_here(tmp_path, name, memory):
    FORMATS[name](tmp_path / name)
    memory.pipe(f"/bucket/{name}", (tmp_path / name).read_bytes())
    found = list(documents(Source(f"memory://bucket/{name}")))
    assert [d.text for d in found] == TEXTS
    assert found[0].id.startswith(f"memory://bucket/{name}:") or found[0].id.startswith(f"memory:///bucket/{name}:")


@pytest.mark.parametrize("name", ["a.txt.zst", "a.zst", "a.txt.gz"])
def test_a_compressed_text_is_one_document(tmp_path, name):
    data = "zwei\nZeilen äöü\n".encode()
    packed = gzip.compress(data) if name.endswith("gz") else pa.compress(data, "zstd", asbytes=True)
    (tmp_path / name).write_bytes(packed)
    assert read(tmp_path / name) == [data.decode()]


def test_a_column_is_taken_by_the_name_that_the_source_or_the_config_says(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "body": ["b"], "title": ["c"]}), tmp_path / "a.parquet")
    for entry, expected in (("", "b"), ("?text=title", "c"), ("?text=text:2", "a")):
        (source,) = parse_sources((f"{tmp_path}/a.parquet{entry}",), "body")
        assert [d.text for d in documents(source)] == [expected]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("a.parquet?text=body", Source("a.parquet", 1.0, "body")),
        ("a.parquet?text=body&epochs=4&limit=1e9:0.5", Source("a.parquet", 0.5, "body", 4.0, 1_000_000_000)),
        ("a.jsonl?limit=1_000:3", Source("a.jsonl", 3.0, "text", limit=1000)),
        ("part-?.jsonl", Source("part-?.jsonl")),  # a pattern's
        ("part-?.jsonl:2", Source("part-?.jsonl", 2.0)),
        ("part-?.jsonl?epochs=1.5", Source("part-?.jsonl", epochs=1.5)),
        ("gs://bucket/a:b/*.jsonl?epochs=2:.5", Source("gs://bucket/a:b/*.jsonl", 0.5, epochs=2.0)),
    ],
)
def test_options_follow_the_path_and_the_weight_follows_them(entry, expected):
    assert parse_sources((entry,)) == [expected]


# ---- folders of data sets --------------------------------------------------------------------------------------------
def test_a_folder_that_datasets_saved_is_read_in_its_order(tmp_path):
    data = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict") == TEXTS
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="holds the splits train, test; name one, as in "):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "test") == TEXTS[:1]


def test_in_a_folder_of_parquet_files_nothing_else_is_text(tmp_path):
    for split, texts in (("train-00000-of-00002", TEXTS[:5]), ("train-00001-of-00002", TEXTS[5:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table(texts), tmp_path / "data" / f"{split}.parquet")
    (tmp_path / "README.md").write_text("# about")
    assert read(tmp_path) == TEXTS
    pq.write_table(table(["seen in evaluation"]), tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="holds the splits test, train; name one by a pattern"):
        read(tmp_path)
    assert read(tmp_path / "data" / "train-*") == TEXTS


# ---- elsewhere -------------------------------------------------------------------------------------------------------
@pytest.fixture
def memory(monkeypatch):
    """fsspec's file system in memory, empty."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    there = fsspec.filesystem("memory")
    there.rm("/", recursive=True) if there.ls("/") else None
    yield there
    there.store.clear()


def test_a_folder_and_a_pattern_elsewhere_are_read_by_name(memory):
    for name in ("b.txt", "c/a.jsonl", "a.txt", ".hidden", ".git/a.jsonl"):
        memory.pipe(f"/bucket/{name}", b'{"text": "from a"}' if "jsonl" in name else name.encode())
    assert read("memory://bucket") == ["from a"]
    assert read("memory://bucket/*.txt") == ["a.txt", "b.txt"]
    assert read("memory://bucket/**/*.jsonl") == ["from a"]
    for nowhere in ("memory://bucket/no.txt", "memory://bucket/*.md", "memory://other"):
        with pytest.raises(UserError, match="no such file, folder or pattern"):
            read(nowhere)


class Hub(MemoryFileSystem):
    """The hub's file system as huggingface_hub lays it out: `datasets/OWNER/NAME/...`."""

    protocol = "hf"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))


def test_a_data_set_on_the_hub_is_read_through_its_file_system(monkeypatch):
    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        hub = fsspec.filesystem("hf")
        hub.pipe("/datasets/me/words/README.md", b"# about")
        hub.pipe("/datasets/me/words/data/train.jsonl", JSONL)
        assert read("hf://datasets/me/words") == TEXTS
        assert read("hf://datasets/me/words/README.md") == ["# about"]
        hub.pipe("/datasets/me/words/data/test.jsonl", JSONL)
        with pytest.raises(UserError, match="holds the splits test, train"):
            read("hf://datasets/me/words")
        assert read("hf://datasets/me/words/data/train*") == TEXTS
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


def test_a_read_that_fails_goes_on_where_it_was(memory, monkeypatch):
    lines = JSONL * 200  # several megabytes, so several reads
    memory.pipe("/bucket/a.jsonl", lines)
    file, opened, failed = type(memory.open("/bucket/a.jsonl")), [], []

    def fails_at_times(self, size=-1):
        if len(failed) < 3 and self.tell() > 1 << 20 and len(failed) < len(opened):
            failed.append(self.tell())
            raise OSError("connection reset")
        return read_all(self, size)

    read_all, open_one = file.read, MemoryFileSystem.open
    monkeypatch.setattr(file, "read", fails_at_times, raising=False)
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *a, **k: (opened.append(1), open_one(*a, **k))[1])
    assert read("memory://bucket/a.jsonl") == TEXTS * 200
    assert len(failed) == 3


def test_a_place_that_keeps_failing_is_told_by_its_name(memory, monkeypatch):
    memory.pipe("/bucket/a.jsonl", JSONL)

    def fails(*args, **kwargs):
        raise OSError("connection reset")

    monkeypatch.setattr(MemoryFileSystem, "open", fails)
    with pytest.raises(UserError, match=r"bucket/a\.jsonl: the bucket failed 4 times \(connection reset\)"):
        read("memory://bucket/a.jsonl")


# ---- memory and packages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.array_record"])
def test_a_reader_holds_no_more_than_a_few_records(tmp_path, name):
    texts = [f"{i} " + "word " * 2000 for i in range(4000)]  # 40 MB
    FORMATS_OF_MANY[name](tmp_path / name, texts)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for document in documents(Source(str(tmp_path / name))):
        assert document.text == texts[count]
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak + most < 16 << 20


def many_jsonl(file: pathlib.Path, texts: list[str]) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = {".gz": lambda d: gzip.compress(d, 1), ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    file.write_bytes(packed.get(file.suffix, lambda d: d)(data))


def many_arrow(file: pathlib.Path, texts: list[str]) -> None:
    with pa.OSFile(str(file), "wb") as f, pa.ipc.new_stream(f, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=100)


FORMATS_OF_MANY = {
    "a.jsonl": many_jsonl,
    "a.jsonl.gz": many_jsonl,
    "a.jsonl.zst": many_jsonl,
    "a.parquet": lambda f, texts: pq.write_table(table(texts), f, use_dictionary=False),
    "a.arrow": many_arrow,
    "a.array_record": lambda f, texts: write_records(f, texts, False),
}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, name, monkeypatch):
    FORMATS.get(name, FORMATS["stream.arrow"])(tmp_path / name)

    def without(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr("solar_jax.data.readers.importlib.import_module", without)
    with pytest.raises(UserError) as e:
        read(tmp_path / name)
    kind = "." + name.rsplit(".", 1)[1]
    expected = f"{kind} files are read with pyarrow, which is not installed; it comes with the extra `data`."
    assert str(e.value) == f"{tmp_path / name}: {expected}"
