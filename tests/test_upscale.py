"""`upscale`: the grown folder holds the layer map's layers, and every mistake is one sentence and leaves nothing."""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers

from solar_jax import upscale
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.cli import command
from solar_jax.cli.command import folder_from_flag
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from tests.conftest import TINY, hf_model, save_hf

LAYERS = TINY["num_hidden_layers"]
DUS = GrowthConfig("dus", m=2)  # 0 1 2 3 | 2 3 4 5
ROOT = pathlib.Path(__file__).parents[1]


def grow(source, out: pathlib.Path, growth: GrowthConfig = DUS, dtype: str | None = None) -> None:
    upscale.upscale(str(source), growth, Target(out, dtype=dtype))


def tensors(folder) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor's bits."""
    found = safetensors.torch.load_file(folder / "model.safetensors")
    return {k: (x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes()) for k, x in found.items()}


def layer(found: dict, i: int) -> dict:
    """The tensors of one layer, by their name within it."""
    start = f"model.layers.{i}."
    return {k.removeprefix(start): x for k, x in found.items() if k.startswith(start)}


@pytest.mark.parametrize(
    "growth",
    [
        DUS,
        GrowthConfig("naive", copies=2),
        GrowthConfig("interleave", copies=3),
        GrowthConfig("block_repeat", a=1, b=5),
        GrowthConfig("slices", slices="4:6,0:2,3:4"),
        GrowthConfig("identity"),
    ],
    ids=lambda g: g.operator,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_output_layer_is_its_source_layer_bit_by_bit(tmp_path, growth, dtype):
    source = save_hf(hf_model().to(getattr(torch, dtype)), tmp_path / "source")
    grow(source, tmp_path / "out", growth)
    layer_map = make_layer_map(LAYERS, growth)
    base, grown = tensors(source), tensors(tmp_path / "out")
    assert sum(k.startswith("model.layers.") for k in grown) == 9 * layer_map.layers
    for i, j in enumerate(layer_map.source):
        assert layer(grown, i) == layer(base, j)
    rest = {k: x for k, x in base.items() if not k.startswith("model.layers.")}
    assert {k: x for k, x in grown.items() if not k.startswith("model.layers.")} == rest
    assert len({layer(base, j)["mlp.up_proj.weight"] for j in range(LAYERS)}) == LAYERS  # layers tell apart


def test_a_copy_that_llama_pro_adds_is_its_source_with_zeroed_outputs(tmp_path, tiny):
    growth = GrowthConfig("llama_pro", every=3)  # 0 1 2 2' 3 4 5 5'
    grow(tiny, tmp_path / "out", growth)
    layer_map = make_layer_map(LAYERS, growth)
    base, grown = tensors(tiny), tensors(tmp_path / "out")
    assert [i for i, scale in enumerate(layer_map.scale) if scale == 0] == [3, 7]
    for i, j in enumerate(layer_map.source):
        found, expected = layer(grown, i), layer(base, j)
        differ = {k for k in expected if found[k] != expected[k]}
        assert differ == ({"self_attn.o_proj.weight", "mlp.down_proj.weight"} if i in (3, 7) else set())
        for k in differ:
            assert torch.frombuffer(bytearray(found[k][2]), dtype=torch.float32).eq(0).all()


def test_slices_are_the_operator_that_they_spell_out(tmp_path, tiny):
    grow(tiny, tmp_path / "dus", DUS)
    grow(tiny, tmp_path / "slices", GrowthConfig("slices", slices="0:4,2:6"))
    names = {f.name for f in (tmp_path / "dus").iterdir()}
    assert {"model.safetensors", "config.json", "lineage.json"} <= names
    assert names == {f.name for f in (tmp_path / "slices").iterdir()}
    for name in names - {"lineage.json", "README.md"}:
        assert (tmp_path / "dus" / name).read_bytes() == (tmp_path / "slices" / name).read_bytes()
    # Lineage and card name the operator, and the lineage its command and date.
    one, other = (json.loads((tmp_path / folder / "lineage.json").read_text()) for folder in ("dus", "slices"))
    assert {key for key in one if one[key] != other.get(key)} - {"date"} == {"operator"}


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"tie_word_embeddings": True}), ("mistral", {})])
def test_transformers_loads_the_grown_folder_and_runs_it(tmp_path, kind, changes):
    base = hf_model(kind, **changes)
    grow(save_hf(base, tmp_path / "source"), tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.num_hidden_layers == 8
    assert len(model.model.layers) == 8
    # The same stack put together in torch.
    base.model.layers = torch.nn.ModuleList(base.model.layers[i] for i in (0, 1, 2, 3, 2, 3, 4, 5))
    base.config.num_hidden_layers = 8
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = model(tokens, use_cache=False).logits, base(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_depth_and_dtype_change_in_the_config_and_the_tokenizer_comes_along(tmp_path, tiny):
    grow(tiny, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tiny / "config.json").read_text())
    expected = config | {"num_hidden_layers": 8, "dtype": "bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    assert {dtype for dtype, _, _ in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes()


def test_a_grown_folder_can_be_grown_again(tmp_path, tiny):
    grow(tiny, tmp_path / "once")
    grow(tmp_path / "once", tmp_path / "twice", GrowthConfig("dus", m=1))
    cfg = open_checkpoint(str(tmp_path / "twice")).cfg
    assert cfg == dataclasses.replace(open_checkpoint(str(tiny)).cfg, num_hidden_layers=14)


def test_a_dry_run_shows_the_map_and_writes_nothing(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upscale.upscale(str(tiny), DUS, None)
    text = capsys.readouterr().out
    assert "6 -> 8 layers" in text
    rows = [line.split()[:3] for line in text.splitlines() if "<-" in line]
    assert ["0..3", "<-", "0..3"] in rows
    assert ["4..7", "<-", "2..5"] in rows
    assert "seam 3|4: source 3 -> 2, layer distance 1" in text
    assert list(tmp_path.iterdir()) == []


def test_the_flags_name_one_growth_and_only_one():
    numbers = {"m": 3}
    assert command.growth_config("dus", None, numbers) == GrowthConfig("dus", m=3)
    assert command.growth_config(None, "0:2,1:3", numbers) == GrowthConfig("slices", m=3, slices="0:2,1:3")
    assert command.growth_config("slices", "0:2", {}) == GrowthConfig("slices", slices="0:2")
    assert command.growth_config(None, None, numbers) is None
    with pytest.raises(UserError, match="--slices and --operator=dus exclude"):
        command.growth_config("dus", "0:2", numbers)


@pytest.mark.parametrize("out", ["gs://", "gs://bucket", "s3://bucket/", "s3:///folder", "az://bucket/folder"])
def test_a_url_of_no_folder_in_a_bucket_is_no_place_to_write_to(out):
    with pytest.raises(UserError, match="expected a local folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"):
        folder_from_flag(out)


def test_a_place_is_local_or_in_a_bucket():
    assert str(folder_from_flag("gs://bucket/a/b")) == "gs://bucket/a/b"
    assert folder_from_flag("~/x") == pathlib.Path.home() / "x"


@pytest.fixture
def mistakes(tiny, tmp_path) -> pathlib.Path:
    """A folder with what commands may be pointed at by mistake."""
    return make_mistakes(tiny, tmp_path)


def make_mistakes(tiny: pathlib.Path, tmp: pathlib.Path) -> pathlib.Path:
    (tmp / "used").mkdir()
    (tmp / "used" / "x").write_text("precious")
    shutil.copytree(tiny, tmp / "cut")
    weights = tmp / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return tmp


def files(folder: pathlib.Path) -> set[tuple[str, bytes | None]]:
    """Every path below a folder, hidden ones too, with a file's content."""
    return {(str(f.relative_to(folder)), f.read_bytes() if f.is_file() else None) for f in folder.rglob("*")}


@pytest.mark.parametrize(
    ("source", "out", "m", "said"),
    [
        ("{tmp}/nothing", "out", 2, "{tmp}/nothing: "),
        ("{tmp}/cut", "out", 2, "{tmp}/cut/model.safetensors: "),
        ("{tiny}", "used", 2, "{tmp}/used: already exists"),
        ("{tiny}", "out", 3, "growth operator dus(m=3) does not fit a base of 6 layers"),
    ],
    ids=["missing source", "truncated weights", "target in use", "m does not fit"],
)
def test_bad_input_is_one_sentence_and_changes_no_file(mistakes, tiny, source, out, m, said):
    before = files(mistakes)
    with pytest.raises(UserError) as e:
        grow(source.format(tmp=mistakes, tiny=tiny), mistakes / out, GrowthConfig("dus", m=m))
    assert str(e.value).startswith(said.format(tmp=mistakes))
    assert len(str(e.value).splitlines()) == 1
    assert files(mistakes) == before


# The whole command, for what only it does: flags, the exit status, and what stands on stderr. {tiny} is a sound
# source, {out} a free target; each with a part of what must be said.
COMMANDS = {
    "missing source": ("upscale --source={tmp}/nothing --out={out} --operator=dus --m=2", "{tmp}/nothing: "),
    "target in use": ("upscale --source={tiny} --out={tmp}/used --operator=dus --m=2", "{tmp}/used: already exists"),
    "truncated weights": ("upscale --source={tmp}/cut --out={out} --operator=dus --m=2", "{tmp}/cut/model.safetensors"),
    "m does not fit": ("upscale --source={tiny} --out={out} --operator=dus --m=3", "found m=3"),
    "unknown flag": ("upscale --source={tiny} --out={out} --operator=dus --n=2", "'n'"),
    "flags missing": ("upscale --out={out} --operator=dus", "--source"),
    "no growth": ("upscale --source={tiny} --out={out}", "--operator NAME or --slices RANGES"),
    "a shard size that is none": ("upscale --source={tiny} --out={out} --operator=dus --m=2 --max_shard_size=big",
                                  "max_shard_size must be a size like 5GB, found 'big'"),
    "operator and slices": ("upscale --source={tiny} --out={out} --operator=dus --slices=0:4", "--slices"),
    "convert: flag missing": ("convert --source={tiny} --out={out}", "--to"),
    "merge: nothing to do": ("merge --out={out}", "one of --config FILE, --method NAME and --candidates NAMES"),
    "merge: unknown method": ("merge --method=magic --model={tiny} --out={out}", "found 'magic'"),
    "merge: no model there": ("merge --method=linear --model={tmp}/nothing:0.5 --out={out}", "{tmp}/nothing: "),
    "merge: no recipe there": ("merge --config={tmp}/no.yml --out={out}", "{tmp}/no.yml: cannot be read"),
    "chain: a run, not a chain": ("chain --config=dus_48l:smollm2", "a file with stages"),
    "chain: no such stage": ("chain --config=solar/chain:smollm2 --rerun=x", "--rerun=x: stages are grow, sft"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str
    said: str  # what must stand in stderr
    changed: set[str]  # paths that the command made, changed or removed


@pytest.fixture(scope="module")
def outcomes(tiny, tmp_path_factory) -> dict[str, Outcome]:
    """Every command's end; two at a time, since each takes seconds to start."""

    def run(name: str) -> Outcome:
        tmp = make_mistakes(tiny, tmp_path_factory.mktemp("command"))
        places = {"tmp": tmp, "tiny": tiny, "out": tmp / "out"}
        command, said = COMMANDS[name]
        module, *flags = (part.format(**places) for part in command.split())
        before = files(tmp)
        done = subprocess.run(
            [sys.executable, "-m", f"solar_jax.{module}", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        changed = {path for path, _ in before ^ files(tmp)}
        return Outcome(done.returncode, done.stdout, done.stderr, said.format(**places), changed)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(run, COMMANDS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_sentence_and_status_2_and_changes_no_file(outcomes, name):
    found = outcomes[name]
    assert found.status == 2, found.stderr
    assert found.stderr.startswith("error: ")
    assert found.said in found.stderr
    assert found.stderr.endswith("\n")
    assert len(found.stderr.splitlines()) == 1
    assert "Traceback" not in found.stdout
    assert found.changed == set()
