"""Text and records that every CPython carries, so that the small recipes need no download."""

import importlib
import inspect
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import Any

TOPICS = "pydoc-topics"  # the documentation topics, as text
FUNCTIONS = "pydoc-functions"  # questions about functions of the standard library, as conversations or pairs
STDLIB = "python-stdlib"  # the sources of the standard library, as text
EMBEDDED = (TOPICS, FUNCTIONS, STDLIB)
_MODULES = (
    "builtins", "math", "itertools", "functools", "collections", "string", "re", "json", "statistics", "random",
    "os.path", "shutil", "datetime", "textwrap", "operator", "bisect", "heapq", "pathlib", "inspect", "zlib",
)  # fmt: skip
# Not part of the library, tables of characters, or the text of TOPICS, whose held-out documents must stay unseen
_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings", "pydoc_data",
}  # fmt: skip


def topics() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each documentation topic."""
    from pydoc_data.topics import topics as found

    yield from ((name, found[name]) for name in sorted(found) if found[name])


def stdlib() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each module of the standard library, without its tests and what is installed beside it."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not _LEFT_OUT & set(name.parts) and (text := _source_text(file)):
            yield name.as_posix(), text


def _source_text(file: pathlib.Path) -> str:
    with tokenize.open(file) as f:  # in the encoding that the file declares
        return f.read()


TEXTS = {TOPICS: topics, STDLIB: stdlib}


def functions() -> list[tuple[str, str]]:
    """The functions and methods of some modules, with the first paragraph of what their documentation says."""
    found: dict[str, str] = {}
    for name in _MODULES:
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or not (callable(value) or inspect.isclass(value)):
                continue
            found.setdefault(f"{name}.{key}", _first_paragraph(value))
            if inspect.isclass(value):
                for method, its in sorted(vars(value).items()):
                    if not method.startswith("_") and callable(its):
                        found.setdefault(f"{name}.{key}.{method}", _first_paragraph(its))
    said: set[str] = set()
    return [(k, text) for k, text in found.items() if text and not (text in said or said.add(text))]


def _first_paragraph(value: Any) -> str:
    text = inspect.getdoc(value) or ""
    paragraphs = [p for p in text.split("\n\n") if p.strip() and "->" not in p and not p.startswith(" ")]
    return " ".join(paragraphs[0].split()) if paragraphs else ""


def records(kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (name, record) of each function.

    Conversations ask what a function does; the answer is its documentation. Of a pair, the chosen answer is that, and
    the rejected one the documentation of the next function.
    """
    found = functions()
    for i, (name, text) in enumerate(found):
        prompt = f"What does {name.removeprefix('builtins.')} do in Python?"
        if kind == "conversations":
            yield name, {"prompt": prompt, "completion": text}
        else:
            yield name, {"prompt": prompt, "chosen": text, "rejected": found[(i + 1) % len(found)][1]}
