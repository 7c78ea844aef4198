"""Folders that appear whole or not at all: locks, jobs that go on, and what may be replaced."""

import contextlib
import json
import os
import pathlib
import shutil

import pytest
import safetensors.torch

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.write_hf import write_model
from solar_jax.errors import UserError
from solar_jax.storage.atomic_folder import JOB, check_space, check_target, new_folder, partial


def names(folder: pathlib.Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def test_a_new_folder_becomes_the_target_only_when_filled(tmp_path):
    out = tmp_path / "a" / "b"
    with new_folder(out) as folder:
        assert not out.exists()
        assert folder.parent == out.parent  # a rename does not cross file systems then
        (folder / "x").write_text("1")
    assert [f.name for f in out.parent.iterdir()] == ["b"]
    assert (out / "x").read_text() == "1"
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask  # a temporary folder's own mode shuts others out


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/x").read_text() == "1"


def write_half(out, error: type[BaseException], job: dict | None = None) -> None:
    with new_folder(out, job=job) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, UserError])
def test_a_failed_export_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        write_half(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_target_that_holds_something_is_refused_and_kept(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    kept = out / "x" if kind == "folder" else out
    kept.write_text("precious")
    with pytest.raises(UserError) as e:
        check_target(out)
    assert str(e.value).startswith(f"{out}: ")
    with pytest.raises(UserError), new_folder(out):
        pytest.fail("the block must not run")
    assert kept.read_text() == "precious"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_target_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as e, new_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
    assert str(e.value).startswith(f"{tmp_path / 'file' / 'out'}: ")


# ---- Links and names ------------------------------------------------------------------------------------------------


def test_a_link_to_an_empty_folder_is_filled_where_it_points(tmp_path):
    """Such as one to a larger disk."""
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "empty")
    with new_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "x").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "empty" / "x").read_text() == "1"
    assert names(tmp_path / "disk") == ["empty"]


def test_a_link_to_a_checkpoint_is_replaced_where_it_points(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "disk" / "model" / "config.json").write_text("{}")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["model"]
    assert names(tmp_path / "out") == ["x"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", ["nothing", "out"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, to, overwrite):
    (tmp_path / "out").symlink_to(tmp_path / to)
    with pytest.raises(UserError, match="dangling symbolic link"), new_folder(tmp_path / "out", overwrite=overwrite):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("length", [248, 300])
def test_a_name_that_is_too_long_is_refused_in_one_sentence(tmp_path, length):
    out = tmp_path / ("x" * length)
    with pytest.raises(UserError, match="File name too long"), new_folder(out):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_a_change_of_the_working_directory_does_not_move_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with new_folder(pathlib.Path("out")) as folder:
        os.chdir("elsewhere")
        (folder / "x").write_text("1")
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_leftover_that_is_no_folder_is_not_followed_or_removed(tmp_path, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("1")
    if kind == "file":
        partial(tmp_path / "out").write_text("mine")
    else:
        partial(tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == [".out.partial", "precious"]
    assert names(tmp_path / "precious") == ["x"]


# ---- One process at a time, and jobs that go on ---------------------------------------------------------------------


def test_a_folder_that_is_being_filled_is_not_filled_by_another(tmp_path):
    with new_folder(tmp_path / "out", job={}) as folder:
        (folder / "x").write_text("1")
        with (
            pytest.raises(UserError, match=r"is being written by process \d+ on .*; wait"),
            new_folder(tmp_path / "out", job={}),
        ):
            pytest.fail("the block must not run")
        assert names(folder) == [JOB, "x"]
    assert names(tmp_path / "out") == ["x"]


def stopped(out: pathlib.Path, job: dict | None, **files: str) -> None:
    """Leaves `out` as a process does that is stopped while it writes."""
    with contextlib.suppress(KeyboardInterrupt), new_folder(out, job=job) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        raise KeyboardInterrupt


def test_the_same_job_finds_what_it_wrote(tmp_path):
    stopped(tmp_path / "out", {"a": [1, None]}, x="1", y="2")
    assert names(tmp_path) == [".out.partial"]
    with new_folder(tmp_path / "out", job={"a": [1, None]}) as folder:
        assert (folder / "x").read_text() == "1"
        assert names(folder) == [JOB, "x", "y"]
    assert names(tmp_path / "out") == ["x", "y"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("job", [{"a": 2}, {}, None])
def test_another_job_finds_nothing_of_it(tmp_path, job):
    stopped(tmp_path / "out", {"a": 1}, x="1")
    (partial(tmp_path / "out") / "sub").mkdir()
    (partial(tmp_path / "out") / "link").symlink_to(tmp_path)
    with new_folder(tmp_path / "out", job=job) as folder:
        assert names(folder) == ([] if job is None else [JOB])
        (folder / "y").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["y"]


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"a": 1}x'])
def test_a_job_whose_note_was_cut_short_begins_anew(tmp_path, text):
    stopped(tmp_path / "out", {"a": 1}, x="1")
    (partial(tmp_path / "out") / JOB).write_text(text, encoding="latin1")
    with new_folder(tmp_path / "out", job={"a": 1}) as folder:
        assert names(folder) == [JOB]


@pytest.mark.parametrize("error", [ValueError, UserError, OSError])
def test_a_job_that_fails_leaves_nothing_to_go_on_with(tmp_path, error):
    with pytest.raises(error):
        write_half(tmp_path / "out", error, {})
    assert names(tmp_path) == []


def test_a_file_of_a_checkpoint_may_have_the_name_of_the_note(tmp_path, tiny):
    source = shutil.copytree(tiny, tmp_path / "source")
    (source / "job.json").write_text("mine")
    c = open_checkpoint(str(source))
    with new_folder(tmp_path / "out", job={"a": 1}) as folder:
        write_model(folder, c, max_shard_size=10**9)
        assert json.loads((folder / JOB).read_text()) == {"a": 1}
    assert (tmp_path / "out" / "job.json").read_text() == "mine"


def test_shards_that_are_whole_are_not_written_again(tmp_path, tiny):
    c = open_checkpoint(str(tiny))
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, c, max_shard_size=200_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4
    for file in files[1::2]:  # as if killed: one is missing, and the next one was half written
        file.rename(file.with_name(f"{file.name}.tmp"))
    os.truncate(f"{files[1]}.tmp", 1000)
    before = {f: f.stat() for f in files[::2]}
    told: list[int] = []
    write_model(tmp_path / "out", c, max_shard_size=200_000, progress=told.append)
    for file, stat in before.items():
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    for file in files:
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert sum(told) == sum(x.nbytes for x in safetensors.torch.load_file(tiny / "model.safetensors").values())


# ---- Replacing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["config.json", "model/config.json"])
def test_a_checkpoint_is_replaced_only_when_asked_for_and_only_at_the_end(tmp_path, config):
    out = tmp_path / "out"
    (out / config).parent.mkdir(parents=True)
    (out / config).write_text("old")
    with pytest.raises(UserError, match="already exists"), new_folder(out):
        pytest.fail("the block must not run")
    with new_folder(out, overwrite=True) as folder:
        (folder / "x").write_text("new")
        assert (out / config).read_text() == "old"
    assert names(out) == ["x"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(ValueError, match="no"), new_folder(out, overwrite=True):
        raise ValueError("no")
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder of other files", "home"])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path, kind):
    out = tmp_path / "out"
    kept = out if kind == "file" else out / "notes" / "config.json" if kind == "home" else out / "model.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(UserError, match="is not a checkpoint"), new_folder(out, overwrite=True):
        pytest.fail("the block must not run")
    assert kept.read_text() == "precious"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("again", ["the same job", "without --overwrite"])
def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path, monkeypatch, again):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = os.rename

    def die(a, b):
        if pathlib.Path(b) == out:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True, job={}) as folder:
        (folder / "config.json").write_text("new")
    monkeypatch.undo()
    assert names(tmp_path) == [".out.old", ".out.partial"]
    (partial(out) / JOB).write_text("{}")  # which a kill after it was removed leaves out; then nothing is gone on with
    if again == "the same job":
        with new_folder(out, overwrite=True, job={}) as folder:
            assert (out / "config.json").read_text() == "old"
            assert (folder / "config.json").read_text() == "new"
        assert (out / "config.json").read_text() == "new"
    else:
        with pytest.raises(UserError, match="already exists"), new_folder(out, job={}):
            pytest.fail("the block must not run")
        assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


# ---- Room -----------------------------------------------------------------------------------------------------------


def test_what_an_earlier_run_left_counts_as_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    out = tmp_path / "new" / "out"
    check_space(out, 1000)
    with pytest.raises(UserError, match=rf"needs 0\.00 GB of disk, but {tmp_path} has 0\.00 GB free"):
        check_space(out, 1001)
    stopped(out, {}, x="x" * 10**6)
    check_space(out, 10**6)
    with pytest.raises(UserError):
        check_space(out, 2 * 10**6)
