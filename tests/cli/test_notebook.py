"""Functions for notebooks: commands that fail, stop and go on; pictures; folders; a kernel that is out of date."""

import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from solar_jax.cli import notebook
from solar_jax.errors import UserError
from tests.conftest import save_model_and_text

REPO = pathlib.Path(__file__).parents[2]


@pytest.fixture
def no_tpu(monkeypatch):
    monkeypatch.setattr(notebook, "tpu_attached", lambda: False)  # the tests themselves have imported jax


def test_what_a_command_says_is_shown_and_a_failure_stops_the_cell(no_tpu, capsys):
    with pytest.raises(UserError, match="plan ended with exit status 2; why, is above"):
        notebook.run_command("plan", "--config=no such file", "--slice=v5e-8")
    assert "error: --config: no such file: no such file, and no recipe" in capsys.readouterr().out


def test_an_argument_reaches_the_command_whole_and_a_status_of_0_goes_on(no_tpu, capsys):
    notebook.run_command("train", "--version")
    assert capsys.readouterr().out.startswith("solar_jax ")
    with pytest.raises(UserError, match="exit status 2"):
        notebook.run_command("report", "--sorce=a b 'c\" $HOME")
    assert "sorce" in capsys.readouterr().out


def test_what_is_typed_is_read_even_by_a_command_that_reads_nothing(no_tpu, capsys):
    notebook.run_command("train", "--version", typed="x" * 1_000_000)
    assert capsys.readouterr().out.startswith("solar_jax ")


def test_a_command_whose_file_is_there_is_left_out(no_tpu, tmp_path, capsys):
    (tmp_path / "made").touch()
    notebook.run_command("train", makes=str(tmp_path / "made"))
    assert capsys.readouterr().out == f"{tmp_path}/made: is there already\n"


def test_a_name_that_is_no_command_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="'grow' is not a command; commands are train, upscale"):
        notebook.run_command("grow")


def test_a_kernel_that_may_hold_the_tpu_starts_no_command(monkeypatch):
    monkeypatch.setattr(notebook, "tpu_attached", lambda: True)
    with pytest.raises(UserError, match="may hold the TPU: restart it"):
        notebook.run_command("train", "--version")
    monkeypatch.delitem(sys.modules, "jax")
    notebook.run_command("train", "--version")  # a negative control


def test_a_kernel_with_an_older_package_in_memory_is_sent_to_restart(monkeypatch):
    notebook.check_kernel()
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version__="0.7.2"))
    with pytest.raises(UserError, match=r"loaded jax 0\.7\.2, before [\d.]+ was installed: restart it"):
        notebook.check_kernel()


@pytest.mark.parametrize(
    ("folder", "asked"),
    [("/content/drive/MyDrive/runs", ["mount"]), ("gs://bucket/runs", ["login"]), ("runs", [])],
)
def test_in_colab_drive_is_mounted_and_a_bucket_logged_in_to(folder, asked, monkeypatch, tmp_path):
    did = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook.importlib.util, "find_spec", lambda name: name)
    made = {
        "google.colab.drive": types.SimpleNamespace(mount=lambda at: did.append("mount")),
        "google.colab.auth": types.SimpleNamespace(authenticate_user=lambda: did.append("login")),
    }
    monkeypatch.setattr(notebook.importlib, "import_module", lambda name: made[name])
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda *_, **__: None)  # /content is not ours
    notebook.use_folder(folder)
    assert did == asked


def test_outside_colab_a_local_folder_is_made(tmp_path):
    notebook.use_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


def test_a_picture_is_shown_by_its_bytes(monkeypatch, tmp_path):
    shown = []
    made = types.SimpleNamespace(Image=lambda data: data, display=shown.append)
    monkeypatch.setattr(notebook.importlib, "import_module", lambda name: made)
    (tmp_path / "x.png").write_bytes(b"png")
    notebook.show_picture(str(tmp_path / "x.png"))
    assert shown == [b"png"]


def test_a_mistake_is_one_sentence_in_a_cell():
    assert UserError("no such file")._render_traceback_() == ["error: no such file"]


# A cell that trains long enough to be stopped, in the way that it is asked to.
CELL = """
import signal
import sys
import solar_jax as sj
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a kernel has it; a shell's background jobs ignore it
CHANGES = {"source": "model", "growth.m": 1, "data.sources": ["corpus.txt"], "data.sequence_length": 32,
           "train.steps": 400, "train.batch_size": 4, "train.control": False, "evaluation.windows": 4,
           "evaluation.every": 4, "checkpoint.every": 100}
if sys.argv[1] == "command":
    changes = [f"--config.{k}={v[0] if isinstance(v, list) else v}" for k, v in CHANGES.items()]
    sj.run_command("train", "--config=dus_48l:smollm2", "--workdir=run", *changes)
else:
    sj.train.run(sj.load_config("dus_48l:smollm2", CHANGES), sj.path("run"))
"""


@pytest.mark.slow  # two runs, each started twice
@pytest.mark.parametrize("way", ["command", "kernel"])
def test_the_stop_button_saves_the_step_and_the_same_cell_goes_on(way, tmp_path):
    save_model_and_text(tmp_path, 4000)
    start = [sys.executable, "-u", "-c", CELL, way]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPO)}
    with subprocess.Popen(
        start, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as cell:
        assert cell.stdout is not None
        said = ""
        for line in cell.stdout:
            said += line
            if "after step 4" in line:
                cell.send_signal(signal.SIGINT)
    assert "stopping after this step, which is saved" in said, said[-3000:]
    assert "the same c" in said  # command or cell
    again = subprocess.run(start, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-3000:]
    assert "healed: written to run/hf" in again.stdout
    assert "after step 4\n" not in again.stdout  # it went on
