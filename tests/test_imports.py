"""The structure that imports show: rooms in order, no cycles, no name twice; and that commands load what they use."""

import ast
import itertools
import pathlib
import subprocess
import sys

import pytest

import solar_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "solar_jax"
COMMANDS = (
    "train", "plan", "upscale", "convert", "merge", "prepare", "make_data", "chain", "generate", "serve", "evaluate",
    "report", "search", "study", "seam", "check",
)  # fmt: skip
# From the lowest floor to the highest: a module imports from its own room and from those before it.
FLOORS = (
    "errors", "config_checks", "config_tree", "config_shapes", "config", "storage", "hardware", "model", "parallel",
    "growth", "cli", "formats", "orbax_store", "checkpoints", "data", "merging", "monitoring", "decoding", "serving",
    "evaluation", "training", "planning", "checking", "searching", "inspecting", "chaining", "studying", *COMMANDS,
    "lm_eval", "__main__",
)  # fmt: skip
LONGEST = 400  # lines of a file


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """The package's modules that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "solar_jax":
            base = (node.module or "").removeprefix("solar_jax").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return found


MODULES = modules()
IMPORTS = {name: imports(file, MODULES) for name, file in MODULES.items()}


def test_no_module_imports_from_a_higher_floor():
    floor = {room: i for i, room in enumerate(FLOORS)}
    rooms = {name.split(".")[0] for name in MODULES if name}
    assert rooms == set(FLOORS), "every room has its floor"
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if name and floor[other.split(".")[0]] > floor[name.split(".")[0]]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_no_file_is_too_long_to_be_read_at_once():
    assert {name: n for name, f in MODULES.items() if (n := len(f.read_text().splitlines())) > LONGEST} == {}


def test_every_docstring_says_what_a_thing_is_or_does():
    """It begins with a verb or a noun phrase that stands alone."""
    files = [file for folder in ("solar_jax", "scripts", "configs", "tests") for file in (ROOT / folder).rglob("*.py")]
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
        and text.split()[0] in ("Of", "What", "That", "Whether")
    ]  # fmt: skip
    assert len(files) > 400
    assert found == []


def test_no_two_public_functions_or_classes_have_one_name():
    # But for what every command has, and what stands for itself in each of two formats.
    shared = {"main", "define_flags", "check", "read_header", "short"}
    names: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(module)
    assert {n: m for n, m in names.items() if len(m) > 1 and n not in shared} == {}


def loaded(code: str, *argv: str) -> set[str]:
    """The packages that are loaded when some code has run in a process of its own."""
    code = (
        f"import sys; sys.argv = {['x', *argv]!r}\n{code}\nprint('LOADED', *{{m.split('.')[0] for m in sys.modules}})"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.rpartition("LOADED")[2].split())


SLOW = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "grain", "gguf", "matplotlib", "huggingface_hub"}
HEAVY = {"optax", "orbax", "flax", "gguf", "grain", "torch", "transformers", "matplotlib", "huggingface_hub", "ray"}
# What each command may load of HEAVY; everything else would cost time and be of no use.
USES = {
    "train": {"optax", "orbax", "flax", "grain"},
    "plan": {"optax", "flax"},
    "check": {"optax", "orbax", "flax"},
    "upscale": {"orbax"},
    "convert": {"orbax"},
    "merge": {"orbax"},
    "generate": {"flax", "optax"},
    "serve": {"flax", "optax"},
    "evaluate": {"flax", "optax"},
    "chain": {"optax", "orbax", "flax", "grain"},
    "prepare": set(),
    "make_data": set(),
    "report": set(),
    "study": {"optax", "orbax", "flax", "grain"},
    "search": {"optax", "orbax", "flax", "grain"},
    "seam": {"optax", "orbax", "flax", "grain"},
}
NO_MODEL = {"make_data", "report"}  # commands that need no jax


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_loads_no_package_that_it_does_not_use(command):
    found = loaded(f"import solar_jax.{command}")
    assert ("jax" in found) == (command not in NO_MODEL)  # a negative control, too
    assert found & HEAVY <= USES[command]


CONFIG = "--config=configs/dus_48l.py:smollm2"
ANSWERED_AT_ONCE = {
    "help": [(command, "--helpshort") for command in COMMANDS],
    "flag": [(command, "--sorce=x") for command in COMMANDS],
    "key": [(command, CONFIG, "--config.train.stesp=3") for command in ("train", "plan", "prepare")],
    "file": [
        ("train", CONFIG, "--config.source=/not/there"),
        ("upscale", "--source=/not/there", "--out=x", "--operator=dus"),
        ("convert", "--source=/not/there", "--out=x", "--to=hf"), ("train", "--config=not_there.py"),
        ("prepare", CONFIG, "--config.data.sources=/not/there", "--out=x"), ("plan", "--config=not_there.py"),
        ("make_data", "--kind=math_instruct", "--questions=x", "--endpoint=http://h", "--out=x", "--api_key_file=/no"),
        ("report", "--out=/dev/null/x"), ("search", "--source=/not/there", "--add=1", "--out=x.json"),
        ("report", "--out=/dev/null/x"), ("seam", "--model=/not/there", "--out=x"),
        ("check", "--model=/not/there"), ("check", "--out=/not/there/x.json"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mistake", ANSWERED_AT_ONCE)
def test_help_and_mistakes_are_answered_before_the_slow_imports(mistake):
    ask = """
import runpy, contextlib, io
said = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    runpy.run_module("solar_jax." + sys.argv.pop(1), run_name="__main__", alter_sys=True)
    raise AssertionError("the command went on")
"""
    for case in ANSWERED_AT_ONCE[mistake]:
        assert loaded(ask, *case) & SLOW == set(), case


def test_the_floors_are_checked_at_all():
    # A negative control of the walk: known edges are found.
    assert "checkpoints.convert" in IMPORTS["upscale"]
    assert all(other in MODULES for others in IMPORTS.values() for other in itertools.chain(others))


def test_the_names_for_a_notebook_are_there_and_cost_nothing_until_used():
    assert loaded("import solar_jax") & SLOW == set()
    for name in solar_jax.__all__:
        assert getattr(solar_jax, name).__name__.removeprefix("solar_jax.") == name
    with pytest.raises(AttributeError, match="has no attribute 'grow'; it has open_checkpoint, grown"):
        _ = solar_jax.grow  # a room, which nothing has imported as an attribute
