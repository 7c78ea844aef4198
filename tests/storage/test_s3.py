"""Checkpoints in an S3 bucket, both forms, against an emulator on loopback; how buckets fail is in test_buckets.py."""

import logging
import subprocess
import sys
import time

import pytest
import s3fs
from etils import epath
from moto.server import ThreadedMotoServer

from solar_jax import convert, upscale
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.storage import retry
from tests.conftest import hf_model, save_hf
from tests.test_kill import ROOT, RUN
from tests.test_processes import run_together

PORT = 9025
LIMIT = "100KB"  # several shards
DUS = GrowthConfig("dus", m=1)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    """A new bucket's URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = ThreadedMotoServer("127.0.0.1", PORT, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as m:
        for name, value in variables.items():
            m.setenv(name, value)
        files = s3fs.S3FileSystem()
        files.mkdir("models")
        yield "s3://models"
        files.rm("models", recursive=True)  # moto keeps buckets until the process ends, for the next module's fixture
        files.invalidate_cache()
    server.stop()


@pytest.fixture(scope="module")
def source(bucket, tiny) -> str:
    for file in tiny.iterdir():
        (epath.Path(f"{bucket}/source") / file.name).write_bytes(file.read_bytes())
    return f"{bucket}/source"


def content(folder) -> dict[str, bytes]:
    """Every tensor and every companion."""
    c = open_checkpoint(str(folder))
    return c.companions | {name: c.read(name).tobytes() for name in c.shape_of}


def test_a_folder_grows_from_bucket_to_bucket_as_it_does_here(bucket, source, tiny, tmp_path):
    out = epath.Path(f"{bucket}/grown")
    upscale.upscale(source, DUS, Target(out, max_shard_size=LIMIT))
    upscale.upscale(str(tiny), DUS, Target(tmp_path / "grown", max_shard_size=LIMIT))
    files = {p.name for p in (tmp_path / "grown").iterdir()}
    assert {p.name for p in out.iterdir()} == files
    for name in files - {"lineage.json", "README.md"}:
        assert (out / name).read_bytes() == (tmp_path / "grown" / name).read_bytes()
    with pytest.raises(UserError, match="already exists"):
        upscale.upscale(source, DUS, Target(out))


def test_an_orbax_checkpoint_goes_to_a_bucket_and_comes_back(bucket, source, tiny, tmp_path):
    own = epath.Path(f"{bucket}/some folder/own")
    convert.convert(source, Target(own, "orbax"), DUS, verify=True)
    convert.convert(str(own), Target(tmp_path / "back"))
    upscale.upscale(str(tiny), DUS, Target(tmp_path / "grown"))
    assert content(own) == content(tmp_path / "back") == content(tmp_path / "grown")
    convert.convert(source, Target(own, "orbax", dtype="bfloat16", overwrite=True))
    found = open_checkpoint(str(own))
    assert (found.common_dtype, found.cfg.num_hidden_layers) == ("bfloat16", 6)


def test_two_processes_fill_an_orbax_checkpoint_together(bucket, source, tiny):
    run_together(2, "solar_jax.convert", f"--source={source}", f"--out={bucket}/two", "--to=orbax")
    assert content(f"{bucket}/two") == content(tiny)


def test_kill_9_leaves_no_checkpoint_and_the_same_command_completes_it(bucket, tmp_path):
    """Killed as the first arrays arrive and again when more have; files of 1 MB, so that there are many."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    source, out = save_hf(hf_model(**sizes), tmp_path / "hf"), f"{bucket}/killed"
    run = RUN.replace("1 << 22, 1 << 23", "1 << 20, 1 << 20")
    command = [sys.executable, "-c", run, "solar_jax.convert", f"--source={source}", f"--out={out}", "--to=orbax"]
    kills = 0
    for arrived in (2, 12, None):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while arrived and process.poll() is None and count(out) < arrived:
            time.sleep(0.01)
        if arrived:
            process.kill()
        if process.wait():
            kills += 1
            with pytest.raises(UserError):
                open_checkpoint(out)
    assert kills == 2, process.stderr.read()
    assert content(out) == content(source)


def count(out: str) -> int:
    """Files of arrays in the bucket."""
    return len(s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True).glob(f"{out}/**/params/d/*"))


def test_a_bucket_that_is_not_there_is_named_and_not_made(bucket, tiny, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    with pytest.raises(UserError, match="s3://nobody/nothing: "):
        open_checkpoint("s3://nobody/nothing")
    for form in ("hf", "orbax"):
        with pytest.raises(UserError, match="s3://nobody/own"):
            convert.convert(str(tiny), Target(epath.Path("s3://nobody/own"), form))
    assert s3fs.S3FileSystem().ls("") == ["models"]
