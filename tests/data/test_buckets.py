"""Text in a bucket, against emulators on loopback."""

import pyarrow.parquet as pq
import pytest
from etils import epath

from solar_jax.data.sources import Source, documents
from solar_jax.errors import UserError
from solar_jax.storage import retry
from tests.data.test_readers import FORMATS, TEXTS, table
from tests.storage.test_s3 import bucket as s3_bucket  # noqa: F401


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)


def read(url: str) -> list[str]:
    return [d.text for d in documents(Source(url))]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow", "text.array_record"]
)
def test_a_file_in_a_bucket_is_read_as_here(tmp_path, bucket, name):
    FORMATS[name](tmp_path / name)
    epath.Path(f"{bucket}/files/{name}").write_bytes((tmp_path / name).read_bytes())
    found = list(documents(Source(f"{bucket}/files/{name}")))
    assert [d.text for d in found] == TEXTS
    assert found[-1].id.startswith(f"{bucket}/files/{name}:")


def test_a_folder_and_a_pattern_in_a_bucket_are_read_by_name(tmp_path, bucket):
    for i, name in enumerate(("train-0", "train-1", "test-0")):
        pq.write_table(table([f"{name} {i}"]), tmp_path / "a.parquet")
        epath.Path(f"{bucket}/set/data/{name}.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    epath.Path(f"{bucket}/set/README.md").write_text("# about")
    assert read(f"{bucket}/set/data/train-*") == ["train-0 0", "train-1 1"]
    assert read(f"{bucket}/set/**/test-*.parquet") == ["test-0 2"]
    with pytest.raises(UserError, match="holds the splits test, train"):
        read(f"{bucket}/set")
    for nowhere in (f"{bucket}/nothing", f"{bucket}/set/*.txt"):
        with pytest.raises(UserError, match="no such file, folder or pattern"):
            read(nowhere)


@pytest.mark.slow  # moto's server starts for seconds
def test_text_in_s3_is_read_as_here(tmp_path, s3_bucket):  # noqa: F811
    for name in ("a.jsonl.gz", "a.parquet"):
        FORMATS[name](tmp_path / name)
        epath.Path(f"{s3_bucket}/text/{name}").write_bytes((tmp_path / name).read_bytes())
    assert read(f"{s3_bucket}/text/a.jsonl.gz") == TEXTS
    assert read(f"{s3_bucket}/text/*.parquet") == TEXTS
    assert read(f"{s3_bucket}/text") == TEXTS  # where there is Parquet, that is the data
