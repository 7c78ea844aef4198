"""The seam command: numbers that must be 0, numbers that must not, pictures, and one sentence for every mistake."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from solar_jax import seam
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from tests.conftest import hf_model, moved, save_hf
from tests.inspecting.models import torch_losses
from tests.test_upscale import grow

ROOT = pathlib.Path(__file__).parents[1]
GROWN, HEALED = range(2)
FILES = {"report.md", "seam.json", "stream.png", "lens.png", "gradients.png", "weights.png", "ablations.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text) -> pathlib.Path:
    """A base, it grown, that changed a little as by healing, and a text."""
    import transformers

    folder = tmp_path_factory.mktemp("seam")
    save_hf(hf_model(), folder / "base")
    grow(folder / "base", folder / "grown")  # 0 1 2 3 | 2 3 4 5
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "grown", attn_implementation="eager")
    save_hf(moved(model, seed=3, by=0.02), folder / "healed")
    shutil.copy(folder / "grown" / "lineage.json", folder / "healed")
    shutil.copy(text, folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def content(folder):
    found = seam.inspect_seams(
        [str(folder / "grown"), str(folder / "healed")], folder / "out", str(folder / "text.txt"),
        source=str(folder / "base"), rows=3, length=16,
    )  # fmt: skip
    assert json.loads((folder / "out" / "seam.json").read_text()) == json.loads(json.dumps(found))
    return found


def test_what_was_not_trained_has_neither_moved_nor_parted_and_may_be_exchanged(content):
    grown = content["models"][GROWN]
    assert grown["twins"]["pairs"] == [[2, 4], [3, 5]]
    assert set(grown["twins"]["relative"]["all"]) == {0.0}
    assert set(grown["moved"]["relative"]["all"]) == set(grown["moved"]["distance"]["all"]) == {0.0}
    for change in ("exchanged", "first_twice", "second_twice"):
        assert grown["blocks"][0][change]["difference"] == 0.0
    # A negative control: everything of it shows in the model that has changed.
    healed = content["models"][HEALED]
    assert min(healed["twins"]["relative"]["all"]) > 1e-3
    assert min(healed["moved"]["relative"]["all"]) > 1e-3
    changes = [healed["blocks"][0][change]["difference"] for change in ("exchanged", "first_twice", "second_twice")]
    assert min(map(abs, changes)) > 1e-5
    assert len(set(changes)) == 3


def test_losses_are_those_of_transformers_with_those_layers_and_paired_by_row(folder, content, monkeypatch):
    import transformers

    from solar_jax.inspecting.heldout_text import heldout_sample

    sample = heldout_sample(str(folder / "text.txt"), 16, 3, open_checkpoint(str(folder / "base")))
    assert len(sample.rows) == content["rows"] == 3
    monkeypatch.setattr("tests.inspecting.models.rows", lambda: sample.rows)
    together = np.stack([[*row["tokens"], row["targets"][-1]] for row in sample.rows])
    monkeypatch.setattr("tests.inspecting.models.tokens", lambda: together)
    healed = content["models"][HEALED]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "healed", attn_implementation="eager").eval()
    whole = torch_losses(model, list(range(8)))
    np.testing.assert_allclose(healed["loss"]["rows"], whole, rtol=2e-5)
    assert [one["layer"] for one in healed["without"]] == list(range(8))
    assert [one["layer"] for one in healed["without"] if one["new"]] == [4, 5]
    orders = {("without", i): [k for k in range(8) if k != i] for i in range(8)}
    orders |= {("exchanged_twins", 0): [0, 1, 4, 3, 2, 5, 6, 7], ("exchanged_twins", 1): [0, 1, 2, 5, 4, 3, 6, 7]}
    for (name, i), order in orders.items():
        rows = torch_losses(model, order) - whole
        found = healed[name][i]
        assert found["difference"] == pytest.approx(rows.mean(), abs=2e-5), (name, i)
        assert found["error"] == pytest.approx(rows.std(ddof=1) / 3**0.5, abs=2e-5), (name, i)
    block = healed["blocks"][0]
    for name, order in (("exchanged", [0, 1, 4, 5, 2, 3, 6, 7]), ("second_twice", [0, 1, 4, 5, 4, 5, 6, 7])):
        expected = (torch_losses(model, order) - whole).mean()
        assert block[name]["difference"] == pytest.approx(expected, abs=2e-5), name
    rows = np.subtract(healed["loss"]["rows"], content["models"][GROWN]["loss"]["rows"])
    assert content["differences"][0]["difference"] == pytest.approx(rows.mean())


def test_every_list_has_an_entry_a_layer_and_the_last_lens_is_the_model(content):
    for model in content["models"]:
        assert model["layer_map"]["source"] == [0, 1, 2, 3, 2, 3, 4, 5]
        assert model["layer_map"]["seams"] == [3]
        assert {len(x) for x in model["gradients"].values()} == {8}
        assert {name: len(x) for name, x in model["stream"].items()} == {
            "norm": 9, "norm_median": 9, "cosine": 8, "attention": 8, "mlp": 8,
        }  # fmt: skip
        assert {len(x) for x in model["lens"].values()} == {9}
        assert model["lens"]["loss"][-1] == pytest.approx(model["loss"]["mean"], rel=1e-5)
        assert (model["lens"]["kl"][-1], model["lens"]["agreement"][-1]) == (0.0, 1.0)
        squares = [model["gradients"][group][0] ** 2 for group in ("attention", "mlp", "norms")]
        assert model["gradients"]["all"][0] == pytest.approx(sum(squares) ** 0.5)
        (one,) = model["seams"]
        assert (one["after"], one["source"], one["twin"]) == (3, [3, 2], 2)
        ratio = model["stream"]["norm_median"][4] / model["stream"]["norm_median"][2]
        assert one["norm_ratio"] == pytest.approx(ratio)


def test_the_report_says_what_was_found_beside_pictures_that_are_there(folder, content):
    assert {p.name for p in (folder / "out").iterdir()} == FILES
    text = (folder / "out" / "report.md").read_text()
    for name in FILES - {"report.md", "seam.json"}:
        assert f"]({name})" in text
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "- grown: its 2 pairs of twins are equal, number by number." in text
    assert "- grown: no layer has moved at all from its start." in text
    assert "grown: Distances are from `base`." in text
    assert "at the seam 3|4 source layer 2 follows 3" in text
    loss = content["models"][HEALED]["loss"]
    assert f"| healed | 8 | dus(m=2) | 4-5 | {loss['mean']:.4f} +- {loss['error']:.3f} |" in text


def test_a_model_without_growth_has_no_twins_and_is_drawn_without_a_seam(folder):
    """In bfloat16, on a row alone, with nothing left out: what cannot be measured is said, not silent."""
    grow(folder / "base", folder / "same", GrowthConfig("identity"))
    found = seam.inspect_seams(
        [str(folder / "same")], folder / "identity", str(folder / "text.txt"), rows=1, length=16, dtype="bfloat16",
        ablate="none",
    )  # fmt: skip
    (model,) = found["models"]
    assert (model["twins"]["pairs"], model["seams"], model["blocks"], model["without"]) == ([], [], [], [])
    assert model["layer_map"]["new"] == []
    assert model["loss"]["error"] is None
    assert model["moved"]["left_out"].startswith("Distances from a start are left out: base, which")
    assert {p.name for p in (folder / "identity").iterdir()} == FILES - {"weights.png", "ablations.png"}
    text = (folder / "identity" / "report.md").read_text()
    assert "same: No growth is in its lineage. Distances from a start are left out" in text
    assert "it has no twins: no two layers copied the same one." in text
    assert "weights.png" not in text
    # Measured in bfloat16, near what float32 gives.
    exact = seam.inspect_seams(
        [str(folder / "same")], folder / "exact", str(folder / "text.txt"), rows=1, length=16, ablate="none"
    )["models"][0]
    assert model["loss"]["mean"] == pytest.approx(exact["loss"]["mean"], rel=0.02)
    assert model["loss"]["mean"] != exact["loss"]["mean"]


def test_mistakes_are_one_sentence_and_leave_nothing(folder):
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    other = save_hf(hf_model(), folder / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["Ġx"] = 300
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    before = {p.name for p in folder.iterdir()}
    for args, said in (
        ([], "seam needs --model SRC, once for each model, and --out DIR."),
        (["--model=grown", "--model=grown", "--out=x"], "--model: a model is given twice; give each once."),
        (["--model=grown", "--out=x", "--rows=0"], "--rows must be at least 1, found 0."),
        (["--model=grown", "--out=full"], "--out=full: already exists; give a new folder."),
        (["--model=grown", "--out=s3://b/x"], "--out=s3://b/x: expected a local folder."),
    ):
        done = run(folder, *args)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    with pytest.raises(UserError, match="not there"):
        seam.inspect_seams([str(folder / "grown")], folder / "x", str(folder / "not there"))
    with pytest.raises(UserError, match=r"other: its tokens are not those of .*grown; losses would not compare\."):
        seam.inspect_seams([str(folder / "grown"), str(other)], folder / "x", str(folder / "text.txt"), length=16)
    with pytest.raises(UserError, match="needs 1000001"):
        seam.inspect_seams([str(folder / "grown")], folder / "x", str(folder / "text.txt"), length=1_000_000)
    assert {p.name for p in folder.iterdir()} == before


def run(folder, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", "solar_jax.seam", *args], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip


def test_the_command_finds_the_base_by_its_lineage_and_agrees_on_four_devices(folder, content):
    place = folder / "grown" / "lineage.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"command": ["upscale", "--source", "base", "--out=grown"]}))
    done = run(
        folder, "--model=grown", "--text=text.txt", "--rows=3", "--length=16", "--ablate=new", "--out=command",
        JAX_NUM_CPU_DEVICES="4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seam 3|4: source 3 -> 2" in done.stdout
    assert "Distances are from `base`, grown by dus(m=2)." in done.stdout
    found = json.loads((folder / "command" / "seam.json").read_text())
    assert found["devices"] == 4
    (model,), expected = found["models"], content["models"][GROWN]
    np.testing.assert_allclose(model["loss"]["rows"], expected["loss"]["rows"], rtol=1e-5)
    np.testing.assert_allclose(model["stream"]["norm"], expected["stream"]["norm"], rtol=1e-5)
    np.testing.assert_allclose(model["gradients"]["all"], expected["gradients"]["all"], rtol=1e-4)
    assert [one["layer"] for one in model["without"]] == [4, 5]
    assert model["without"][0]["difference"] == pytest.approx(expected["without"][4]["difference"], abs=1e-5)
    assert set(model["moved"]["relative"]["all"]) == {0.0}
