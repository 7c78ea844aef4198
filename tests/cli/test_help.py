"""First things that a new user types: --help, --version, a command's name, a recipe's name, Ctrl-C."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest

from solar_jax.checkpoints import convert as conversion
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.cli.config_files import find_config, load_config
from solar_jax.cli.config_keys import config_keys
from solar_jax.cli.help import COMMANDS
from solar_jax.config import Config
from solar_jax.errors import UserError
from solar_jax.growth.operators import OPERATORS
from solar_jax.storage.atomic_folder import partial

REPO = pathlib.Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *args], cwd=REPO, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_all_flags_of_a_command_with_an_example(name):
    done = run(f"solar_jax.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (REPO / "solar_jax" / f"{name}.py").read_text())
    if name in ("upscale", "convert"):
        defined += re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (REPO / "solar_jax" / "cli" / "command.py").read_text())
        defined += ["m", "a", "b", "every", "copies"]
        for operator in OPERATORS:
            assert f"\n  {operator}\n      " in done.stdout
    for flag in defined:
        assert re.search(rf"\n  --(\[no\])?{flag}[=\n]", done.stdout), flag
    assert f"\n    python -m solar_jax.{name} --" in done.stdout
    if name == "train":
        for key in ("config.data.sources", "config.growth.m", "config.mesh.fsdp", "config.logging.wandb_project"):
            assert f"\n  {key}=" in done.stdout


def test_every_key_of_the_config_has_its_comment():
    keys = {key.name: key for key in config_keys()}
    assert keys["config.seed"].default == "0"
    assert keys["config.growth.m"].comment == "dus, zeroed: layers cut from each side of the seam"
    assert keys["config.data.sources"].comment.startswith('Each entry is "PATH[?text=COLUMN')
    assert len(keys) == sum(1 for _ in config_keys())
    plain = {"config.name", "config.seed", "config.train.steps", "config.export.dtype", "config.export.max_shard_size"}
    unsaid = {name for name, key in keys.items() if not key.comment and not name.startswith("config.model.")}
    assert unsaid <= plain | {name for name in keys if name.startswith("config.optimizer.")}


def test_the_package_runs_its_commands_and_says_its_version():
    done = run("solar_jax", "--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"\n  {name} +[A-Z]", done.stdout)
    assert re.fullmatch(r"solar_jax \d+\.\d+\.\d+\n", run("solar_jax", "--version").stdout)
    assert run("solar_jax", "upscale", "--version").stdout == run("solar_jax.train", "--version").stdout
    done = run("solar_jax", "upscale", "--source", "nothing", "--operator", "dus", "--dry_run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nothing: no such checkpoint")
    done = run("solar_jax", "heal")
    assert done.returncode == 2
    assert done.stderr == f"error: 'heal' is not a command; commands are {', '.join(COMMANDS)}.\n"


def test_a_recipe_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    expected = f"{REPO / 'configs' / 'dus_48l.py'}"
    monkeypatch.chdir(tmp_path)  # no checkout here
    for text in ("dus_48l", "dus_48l.py", "configs/dus_48l.py"):
        assert find_config(text) == expected
    assert find_config("dus_48l:smollm2") == f"{expected}:smollm2"
    (tmp_path / "dus_48l.py").write_text("")
    assert find_config("dus_48l.py:a") == "dus_48l.py:a"  # a file of one's own comes first
    for text in ("other", "elsewhere/dus_48l.py"):
        with pytest.raises(UserError, match=f"--config: {text}: no such file, and no recipe of that name; recipes are"):
            find_config(text)


def test_a_recipe_can_be_loaded_and_changed_from_python():
    config = load_config("dus_48l:smollm2", {"train.steps": 3, "growth.m": 5, "data.sources": ["a", "b"]})
    assert isinstance(config, Config)
    assert (config.train.steps, config.growth.m, config.data.sources) == (3, 5, ("a", "b"))
    with pytest.raises(UserError, match=r"config.train.step is not a key of the config; did you mean config.train.ste"):
        load_config("dus_48l:smollm2", {"train.step": 3})


def test_ctrl_c_before_a_command_has_started_is_a_sentence(tmp_path):
    code = "import os, signal, sys; sys.argv = ['x', '--source', 'smollm2', '--out', 'y', '--to', 'hf']\n"
    code += "from solar_jax import convert\nfrom solar_jax.cli import command\n"
    code += "command.begin(convert.define_flags, lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "error: interrupted.\n")


def test_ctrl_c_in_a_conversion_says_what_is_left_and_keeps_it(tiny, tmp_path, monkeypatch):
    def interrupted(*args, progress, **kwargs):
        progress(123_000_000)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_model", interrupted)
    with pytest.raises(KeyboardInterrupt) as e:
        convert_checkpoint(open_checkpoint(str(tiny)), Target(tmp_path / "out"), "convert")
    assert f"{tmp_path / 'out'}: interrupted after 0.12 of 0.00 GB; the same command goes on from what is" in str(
        e.value
    )
    assert partial(tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
