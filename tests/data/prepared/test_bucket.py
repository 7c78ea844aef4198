"""Prepared rows in a bucket, against an emulator on loopback."""

import tempfile

import pytest
from etils import epath

from solar_jax.data.prepared import rows
from solar_jax.data.prepared.rows import is_prepared
from solar_jax.errors import UserError
from solar_jax.prepare import Options, prepare
from solar_jax.storage import retry
from tests.data.prepared.test_build import assert_same_rows, config, jsonl, opened, random_texts


def test_rows_in_a_bucket_are_copied_when_they_are_read_and_are_the_same(bucket, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    cfg = config(tiny, jsonl(tmp_path / "a.jsonl", random_texts(0, 100)))
    out, folder = tmp_path / "out", epath.Path(f"{bucket}/prepared")
    prepare(cfg, out, Options(1))
    assert not is_prepared(str(folder))
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert is_prepared(str(folder))
    found, expected = opened(cfg, str(folder)), opened(cfg, out)
    assert not list((tmp_path / "tmp").rglob("*.array_record"))  # nothing is copied before it is read
    assert_same_rows(found.train, expected.train)
    copies = list((tmp_path / "tmp").rglob("*.array_record"))
    assert sorted(c.name for c in copies) == sorted(f.name for f in out.glob("train-*"))
    assert not [f for f in (tmp_path / "tmp").rglob("tmp*") if f.is_file()]

    # A copy serves the next run, whatever became of the object; without one it is told.
    rows._reader.cache_clear()
    shard = folder / copies[0].name
    shard.write_bytes(b"")
    assert_same_rows(opened(cfg, str(folder)).train, expected.train)
    rows._reader.cache_clear()
    copies[0].unlink()
    with pytest.raises(UserError, match="is not an ArrayRecord file, or is damaged"):
        opened(cfg, str(folder)).train[0]
    shard.unlink()
    with pytest.raises(UserError, match="is missing; manifest"):
        opened(cfg, str(folder))
