"""Small files, written whole."""

import pytest
import tensorstore as ts

from solar_jax.storage import paths


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    paths.write_file(file, "old")

    def crash(*_):
        raise OSError

    monkeypatch.setattr(paths.os, "replace", crash)
    with pytest.raises(OSError):  # noqa: PT011
        paths.write_file(file, "new and longer")
    assert file.read_text() == "old"
    assert paths.read_text(file) == "old"


def test_an_object_of_a_bucket_is_read_as_it_was_written_and_none_where_there_is_none(bucket):
    file = paths.path(f"{bucket}/places/a b.json")
    assert paths.read_text(file) is None
    paths.write_file(file, "née")
    paths.write_file(file, "né")
    assert paths.read_text(file) == "né"


def test_an_object_that_others_wrote_after_a_listing_is_there(bucket):
    folder = paths.path(f"{bucket}/places")
    paths.write_file(folder / "ours", "")
    assert [p.name for p in folder.iterdir() if p.name == "theirs"] == []
    ts.KvStore.open({"driver": "gcs", "bucket": "models", "path": "places/"}).result().write("theirs", b"x").result()
    assert (folder / "theirs").exists()
    assert "theirs" in [p.name for p in folder.iterdir()]
