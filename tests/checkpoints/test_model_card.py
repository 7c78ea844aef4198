"""The folder that is uploaded: a card that the hub understands, the base's card beside it, and no path of a machine."""

import json
import pathlib
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.push import push
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map

BASE_CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# The base\n"


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> pathlib.Path:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("card") / "models--owner--base" / "snapshots" / "0123abc")
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def deeper(base, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("card") / "deeper"
    c = open_checkpoint(str(base))
    losses = {"base": 2.8197, "grown, not trained": 3.6196}
    convert_checkpoint(grown(c, make_layer_map(6, GrowthConfig("dus", m=2))), Target(out), "upscale", losses=losses)
    return out


def test_the_hub_reads_the_front_matter(deeper):
    card = ModelCard.load(deeper / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["solar_jax", "depth-up-scaling"]


def test_the_card_says_what_was_done_how_to_load_it_and_what_was_measured(deeper):
    text = (deeper / "README.md").read_text()
    assert "owner/base, made deeper with solar_jax by `dus(m=2)`; not trained since." in text
    assert 'AutoModelForCausalLM.from_pretrained("deeper", dtype="auto")' in text
    assert "seam 3|4: source 3 -> 2, layer distance 1" in text
    assert "| base | 2.8197 |\n| grown, not trained | 3.6196 |" in text
    assert (deeper / "README.base.md").read_text() == BASE_CARD
    assert "`README.base.md`" in text


def test_the_card_of_a_converted_model_remembers_base_and_growth(deeper, tmp_path):
    convert_checkpoint(open_checkpoint(str(deeper)), Target(tmp_path / "own", "orbax"), "convert")
    convert_checkpoint(open_checkpoint(str(tmp_path / "own")), Target(tmp_path / "again"), "convert", verify=True)
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert (card.data.base_model, card.data.license) == ("owner/base", "apache-2.0")
    assert "owner/base, made deeper with solar_jax by `dus(m=2)`" in card.text
    assert "Source layer of each layer: [0, 1, 2, 3, 2, 3, 4, 5]" in card.text
    assert (tmp_path / "again" / "README.base.md").read_text() == BASE_CARD


def test_a_source_without_a_license_is_said_so(tiny, tmp_path):
    convert_checkpoint(open_checkpoint(str(tiny)), Target(tmp_path / "out"), "convert")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The source states no license" in text
    assert "license:" not in text
    assert "base_model:" not in text


def test_no_absolute_path_is_in_a_folder_that_is_uploaded(deeper, tmp_path):
    convert_checkpoint(open_checkpoint(str(deeper)), Target(tmp_path / "out"), "convert", verify=True)
    for file in ("README.md", "lineage.json", "certificate.json", "config.json"):
        found = re.findall(r"(?<![\w.:/<`])/[\w.-]+/[\w./-]+", (tmp_path / "out" / file).read_text())
        assert found == [], file
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["base_model"] == "owner/base"


class Hub:
    """The part of the client's HfApi that an upload needs."""

    uploaded: dict[str, str] = {}  # noqa: RUF012

    def create_repo(self, repo, exist_ok):
        assert exist_ok
        if repo == "somebody/else":
            raise RuntimeError("403 Forbidden:\n  you may not")
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.uploaded[repo_id] = folder_path


def test_an_upload_goes_to_the_repository_and_a_refusal_says_how_to_try_again(deeper, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push(deeper, "me/deeper") == "https://huggingface.co/me/deeper"
    assert Hub.uploaded == {"me/deeper": str(deeper)}
    with pytest.raises(UserError) as e:
        push(deeper, "somebody/else")
    assert str(e.value) == (
        f"--push_to_hub=somebody/else: the hub refuses it (RuntimeError: 403 Forbidden: you may not); {deeper} is "
        f"complete, and `hf upload somebody/else {deeper}` tries again."
    )
