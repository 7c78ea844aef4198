"""The documentation: links lead somewhere, generated pages are current, and what it shows runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from scripts.docs import config_page
from solar_jax.cli.help import COMMANDS
from tests.conftest import save_model_and_text

REPO = pathlib.Path(__file__).parents[1]
PAGES = sorted((REPO / "docs").glob("*.md"))


def test_the_site_builds_and_no_link_or_anchor_leads_nowhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / page.stem / "index.html").exists() or page.stem == "index"


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    in_colab = re.findall(r"https://colab\.research\.google\.com/github/\w+/\w+/blob/main/(\S+)", text)
    assert len(in_colab) == len(list((REPO / "notebooks").glob("*.ipynb")))
    for target in [*re.findall(r"\]\(([^)#]+)", text), *in_colab]:
        assert (REPO / target).exists(), target


def test_the_page_of_config_keys_is_current():
    assert config_page.PAGE.read_text() == config_page.page(), "run scripts/docs/config_page.py"


@pytest.mark.parametrize("page", [*PAGES, REPO / "README.md"], ids=lambda p: p.name)
def test_commands_and_flags_that_a_page_shows_exist(page):
    """Every line that starts one of our commands names flags that its --help lists."""
    text = page.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"(?:solar-jax |solar_jax\.)(\w+)((?: +(?:--?[\w.]+|\[|[^\n`#]))*)", text):
        if name not in COMMANDS:
            continue
        for flag in re.findall(r"--(config\.[\w.]+|\w+)", rest):
            known = help_of(name)
            assert re.search(rf"(?:^|\s)--?(\[no\])?{re.escape(flag)}\b|\b{re.escape(flag)}=", known), (
                f"{name} --{flag}"
            )


_helps: dict[str, str] = {}


def help_of(name: str) -> str:
    if name not in _helps:
        done = subprocess.run(
            [sys.executable, "-m", f"solar_jax.{name}", "--help"], cwd=REPO, capture_output=True, text=True, check=True
        )
        _helps[name] = done.stdout + " --help --version"
    return _helps[name]


@pytest.mark.slow  # a run
def test_the_page_about_python_runs_from_top_to_bottom(tmp_path):
    save_model_and_text(tmp_path, 4000)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (REPO / "docs" / "python.md").read_text(), re.DOTALL))
    (tmp_path / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in tmp_path.iterdir()} >= {"deeper", "trained", "run"}
