"""mergekit, which people use for this today: the same layers give the same bytes, and it reads what we write."""

import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers

from solar_jax import upscale
from solar_jax.checkpoints.convert import Target
from solar_jax.config import GrowthConfig
from tests.conftest import hf_model, save_hf

pytestmark = pytest.mark.slow  # it imports for ten seconds
MERGEKIT = pathlib.Path(sys.executable).parent / "mergekit-yaml"


def passthrough(model: pathlib.Path, ranges: list[tuple[int, int]], out: pathlib.Path) -> None:
    """mergekit's merge of layer ranges of one model, each layer as it is."""
    lines = [f"  - sources: [{{model: '{model}', layer_range: [{a}, {b}]}}]" for a, b in ranges]
    recipe = out.with_suffix(".yml")
    recipe.write_text("\n".join(["slices:", *lines, "merge_method: passthrough", "dtype: bfloat16"]))
    done = subprocess.run([MERGEKIT, recipe, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def bits(folder: pathlib.Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {k: x.view(torch.uint8).numpy().tobytes() for k, x in safetensors.torch.load_file(file).items()}
    return found


@pytest.fixture(scope="module", params=["llama", "mistral"])
def source(request, tmp_path_factory) -> pathlib.Path:
    model = hf_model(request.param, num_hidden_layers=4).to(torch.bfloat16)
    return save_hf(model, tmp_path_factory.mktemp("source") / request.param)


def test_dus_is_bitwise_the_passthrough_merge_of_the_same_layers(source, tmp_path):
    upscale.upscale(str(source), GrowthConfig("dus", m=1), Target(tmp_path / "ours", max_shard_size="100KB"))
    passthrough(source, [(0, 3), (1, 4)], tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert bits(tmp_path / "ours") == bits(tmp_path / "theirs")


def test_mergekit_and_transformers_read_a_grown_checkpoint_as_it_is(source, tmp_path):
    upscale.upscale(str(source), GrowthConfig("dus", m=1), Target(tmp_path / "ours", max_shard_size="100KB"))
    passthrough(tmp_path / "ours", [(0, 6)], tmp_path / "again")
    assert bits(tmp_path / "again") == bits(tmp_path / "ours")
    ours, again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("ours", "again")
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, again(tokens).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")("abc")["input_ids"]
