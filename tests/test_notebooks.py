"""The notebooks: each runs from an empty environment by its own cells, with a small budget; what they name exists."""

import ast
import base64
import builtins
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator

import matplotlib.image
import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

import solar_jax
from solar_jax.cli.config_files import load_config
from tests.conftest import save_model_and_text

REPO = pathlib.Path(__file__).parents[1]
FOLDER = REPO / "notebooks"
PYTHON = "3.13"  # Colab's
KERNEL = "empty"
TINY = "--config.growth.m=1 --config.data.sequence_length=64 --config.train.batch_size=2 --config.evaluation.windows=2"


@dataclasses.dataclass(frozen=True)
class Case:
    """A notebook's small budget and what it must show."""

    values: dict[str, object]  # of the parameter cell
    texts: tuple[str, ...]
    pictures: int


SMALL = {"PRECISION": "float32", "LENGTH": 64, "ROWS": 2, "WINDOWS": 2, "NEW_TOKENS": 4}
# In this order: tune.ipynb goes on from what grow.ipynb leaves.
CASES = {
    "grow": Case(
        SMALL | {"M": 13, "STEPS": 2, "ABLATE": "none", "SEAM_ROWS": 1, "SEAM_LENGTH": 32},
        ("30 -> 34 layers", "seam 16|17", "held-out loss", "healed: written to", "## The residual stream"),
        2,
    ),
    "tune": Case(
        SMALL | {"HEAL_STEPS": 1, "LORA_RANK": 4, "LENGTH": 192, "CONVERSATIONS": "pydoc-functions?limit=400",
                 "PAIRS": "pydoc-functions?limit=400"},
        ("runs/healed/summary.json", "What does os.path.join do in Python?", "0.693"),
        2,
    ),
    "your_own": Case(
        SMALL | {"SOURCE": "model", "TEXT": "corpus.txt", "M": 1, "STEPS": 2},
        ("4 -> 6 layers", "nats per token", "held-out loss", "model.safetensors"),
        2,
    ),
    "slice_7b": Case(
        {"RECIPE": "dus_48l:smollm2", "SOURCE": "model", "TEXT": "corpus.txt", "STEPS": 2,
         "FLAGS": TINY, "NEW_TOKENS": 4},
        ("mistral_7b_v5e_8: 48 layers", "estimated", "planned", "measured", "held-out loss"),
        1,
    ),
}  # fmt: skip
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    """The one cell that has a tag."""
    (cell,) = [c for c in notebook.cells if tag in c.metadata.get("tags", [])]
    return cell


# ---- Run ------------------------------------------------------------------------------------------------------------


def pythons() -> list[str]:
    """Values of `uv venv --python` for Colab's Python, and at last this one."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    return [*map(str, sorted(pyenv.glob(f"versions/{PYTHON}.*/bin/python"), reverse=True)), PYTHON, sys.executable]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Iterator[KernelSpecManager]:
    """An environment with a kernel and nothing else, which the first notebook's own cell fills."""
    folder, uv = tmp_path_factory.mktemp("kernel"), os.environ.get("UV") or shutil.which("uv")
    assert uv is not None
    for python in pythons():
        command = [uv, "venv", "--quiet", "--seed", "--clear", "--python", python, str(folder / "env")]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0:
            break
    python = folder / "env" / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "ipykernel"], cwd=folder, check=True)
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"the notebooks run in {version}")
    if not version.startswith(f"Python {PYTHON}."):
        warnings.warn(f"no Python {PYTHON}, Colab's, was found: the notebooks run in {version}", stacklevel=1)
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": KERNEL,
        "language": "python",
        # The tests' pins; and nothing of this checkout or of the tests' eight devices.
        "env": {"PIP_CONSTRAINT": str(REPO / "constraints.txt"), "PYTHONPATH": "", "JAX_NUM_CPU_DEVICES": "1"},
    }
    (folder / "kernels" / KERNEL).mkdir(parents=True)
    (folder / "kernels" / KERNEL / "kernel.json").write_text(json.dumps(spec))
    yield KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    shutil.rmtree(folder / "env")  # 1.3 GB


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[pathlib.Path]:
    """Where all notebooks work, with a tiny model and text for those that take one's own."""
    folder = save_model_and_text(tmp_path_factory.mktemp("notebooks"), 4000)
    yield folder
    shutil.rmtree(folder)  # 10 GB


def with_values(source: str, values: dict[str, object]) -> str:
    """A parameter cell with other values."""
    for name, value in values.items():
        source, found = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", source)
        assert found == 1, f"the parameter cell sets no {name}"
    return source


def shown(notebook: nbformat.NotebookNode) -> tuple[str, list[bytes]]:
    """All text and all pictures of a notebook's outputs."""
    text, pictures = [], []
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        text.append(output.get("text", ""))
        data = output.get("data", {})
        if "image/png" in data:
            pictures.append(base64.b64decode(data["image/png"]))
        else:
            text.append(data.get("text/plain", ""))
    return "".join(text), pictures


def is_empty(png: bytes) -> bool:
    """True for a picture of one colour."""
    return float(matplotlib.image.imread(io.BytesIO(png)).std(axis=(0, 1)).max()) < 0.01


@pytest.mark.slow  # an environment is installed, the real model is grown and tuned
@pytest.mark.parametrize("name", CASES)
def test_a_notebook_runs_from_an_empty_environment_and_shows_what_it_promises(name, kernels, place):
    case, notebook = CASES[name], read(name)
    cell = tagged(notebook, "parameters")
    cell.source = with_values(cell.source, case.values | {"SOLAR_JAX": str(REPO)})
    manager = AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=kernels)
    client = nbclient.NotebookClient(notebook, km=manager, timeout=900, resources={"metadata": {"path": str(place)}})
    client.execute(cleanup_kc=True)  # raises with the cell and its traceback; a kernel is not left behind
    text, pictures = shown(notebook)
    for expected in case.texts:
        assert expected in text, f"{expected!r} is missing in\n{text[-3000:]}"
    assert len(pictures) == case.pictures
    assert not any(map(is_empty, pictures))


def test_a_picture_of_one_colour_would_be_noticed():
    from matplotlib.figure import Figure

    figure, blank, drawn = Figure(), io.BytesIO(), io.BytesIO()
    figure.savefig(blank, format="png")
    figure.subplots().plot([1, 2])
    figure.savefig(drawn, format="png")
    assert is_empty(blank.getvalue())
    assert not is_empty(drawn.getvalue())


# ---- Names in them --------------------------------------------------------------------------------------------------


def test_every_notebook_is_run_here():
    assert {file.stem for file in NOTEBOOKS} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_notebook_opens_on_a_tpu_in_colab_and_has_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata["accelerator"] == "TPU"
    assert notebook.metadata["colab"]["gpuType"] == "V5E1"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert [cell.metadata.get("tags") for cell in code[:2]] == [["parameters"], ["install"]]
    for line in code[0].source.splitlines():
        assert line.startswith("#") or "# @param" in line, "a form has no field for it"
    assert f"notebooks/{name}.ipynb" in notebook.cells[0].source


def test_all_notebooks_install_in_the_same_way():
    assert len({tagged(read(name), "install").source for name in CASES}) == 1


def python_of(cell: nbformat.NotebookNode) -> ast.Module:
    return ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))


def names_of(notebook: nbformat.NotebookNode) -> dict[str, object]:
    """The names that the cells tagged parameters and names set."""
    found: dict[str, object] = {}
    for tag in ("parameters", "names"):
        exec(tagged(notebook, tag).source, found)
    return found


def calls(notebook: nbformat.NotebookNode, function: str) -> list[ast.Call]:
    trees = [python_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    return [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == function]


def value(node: ast.expr, names: dict[str, object]) -> object:
    """The value of an expression; of names that a loop sets, text."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id not in names and not hasattr(builtins, inner.id):
            names = {inner.id: "dus_48l:smollm2"} | names
    return eval(compile(ast.Expression(ast.fix_missing_locations(node)), "cell", "eval"), dict(names))


# Runs commands up to where their flags are understood, and resolves their configs.
UNDERSTAND = """
import json, runpy, sys
from absl import flags
from solar_jax.cli import command
from solar_jax.config import resolve
real = command.begin
def understood(define_flags, check, **more):
    def stop():
        if "config" in flags.FLAGS:
            resolve(flags.FLAGS.config)
        sys.exit("understood")
    real(define_flags, stop, **more)
command.begin = understood
for words in json.loads(sys.stdin.read()):
    before, sys.argv = set(flags.FLAGS), words
    try:
        runpy.run_module("solar_jax." + words[0], run_name="__main__", alter_sys=True)
    except SystemExit as e:
        print(e.code)
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
"""


def understood(commands: list[list[str]]) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", UNDERSTAND], input=json.dumps(commands), cwd=REPO, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.split("\n")[:-1], done.stderr


@pytest.mark.parametrize("name", CASES)
def test_every_flag_and_config_key_of_a_notebook_exists(name):
    notebook = read(name)
    names = names_of(notebook)
    commands = [value(ast.List(call.args, ast.Load()), names) for call in calls(notebook, "sj.run_command")]
    configs = calls(notebook, "sj.load_config")
    assert len(commands) >= 4 or configs
    answers, said = understood(commands)
    assert answers == ["understood"] * len(commands), said
    for call in configs:
        load_config(*[value(argument, names) for argument in call.args])


def test_a_flag_or_key_that_does_not_exist_would_be_noticed():
    bad = [["upscale", "--sorce=x"], ["train", "--config=sft:smollm2", "--config.train.stesp=1"], ["plan", "--help="]]
    answers, said = understood([["seam", "--rows=1"], *bad])
    assert answers == ["understood", "2", "2", "2"]
    assert "sorce" in said
    assert "stesp" in said


@pytest.mark.parametrize("name", CASES)
def test_every_name_that_a_notebook_takes_from_the_package_is_there(name):
    for tree in (python_of(cell) for cell in read(name).cells if cell.cell_type == "code"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sj":
                assert node.attr in solar_jax.__all__


@pytest.mark.parametrize("name", CASES)
def test_a_notebook_that_runs_commands_leaves_the_tpu_to_them(name):
    notebook = read(name)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    runs_commands, imports_jax = "sj.run_command" in code, bool(re.search(r"(?m)^(import|from) jax", code))
    assert runs_commands != imports_jax
    assert "process" in notebook.cells[0].source or "kernel" in notebook.cells[0].source
