"""The report command: what it writes, and one sentence for what it cannot read."""

import os
import subprocess
import sys

from solar_jax.evaluation.report import write_report
from tests.evaluation.made_results import full_file, subset_file, write


def run(folder, *args):
    return subprocess.run(
        [sys.executable, "-m", "solar_jax.report", *args], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip


def test_a_page_and_a_picture_are_written_and_flags_may_follow_files(tmp_path):
    write(tmp_path, "a.json", full_file("a"))
    write(tmp_path, "b.json", subset_file("b"))
    done = run(tmp_path, "a.json", "b.json", "--out", "new/out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "new/out/report.md: written\nnew/out/report.png: written\n"
    assert {p.name for p in (tmp_path / "new/out").iterdir()} == {"report.md", "report.png"}
    assert (tmp_path / "new/out/report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    write(tmp_path, "a.json", full_file())
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "link.json").symlink_to("a.json")
    before = {p.name for p in tmp_path.iterdir()}
    for args, said in (
        (("--out=out",), "report needs --out DIR and one FILE.json of evaluate, or several."),
        (("a.json",), "report needs --out DIR and one FILE.json of evaluate, or several."),
        (("a.json", "text.json", "--out=out"), "text.json: is not JSON: Expecting value: line 1 column 1 (char 0)."),
        (("a.json", "none.json", "--out=out"), "none.json: cannot be read: No such file or directory."),
        (("a.json", "a.json", "--out=out"), "a.json: is given twice; give each evaluation once."),
        (
            ("a.json", "link.json", "--out=out"),
            "link.json: is given twice, also as a.json; give each evaluation once.",
        ),
        (("a.json", "--out=text.json"), "text.json: expected a folder for report.md, found a file."),
    ):
        done = run(tmp_path, *args)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_report_may_stand_beside_its_file_under_its_name(tmp_path):
    """As `evaluate` can write it: other reports of the folder stay."""
    file = write(tmp_path, "a.json", full_file("a"))
    (tmp_path / "report.md").write_text("another")
    assert write_report([file], tmp_path, "a") == [tmp_path / "a.md", tmp_path / "a.png"]
    assert "![Scores with standard errors](a.png)" in (tmp_path / "a.md").read_text()
    assert (tmp_path / "report.md").read_text() == "another"
