"""Times merges of checkpoints on disk, next to mergekit's of the same recipes; compares the results.

    uv run --extra test python scripts/bench/merge.py --work DIR [--repeats 3] [--methods linear,slerp,ties]

DIR needs 14 GB for the 1.1B models, of random bfloat16 weights that are made there: a base and three near it, as
fine-tuned models are. Each repeat runs both programs, in turns, each into a fresh target folder. `--size 10b` makes
two models of SOLAR's shape (21.5 GB each) and runs ours alone, next to a plain copy of the result; `10b-4` has four of
its 48 layers, for the memory that such tensors need.
"""

import argparse
import functools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from interleaved import wait_until_idle
from upscale import measure

from solar_jax.checkpoints.checkpoint import row_blocks
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.formats.safetensors import Piece, write_safetensors

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16", "max_position_embeddings": 4096, "num_attention_heads": 32,
}  # fmt: skip
SIZES = {
    "1b": COMMON | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                    "num_key_value_heads": 4},
    "10b": COMMON
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 48,
                     "num_key_value_heads": 8},
}  # fmt: skip
SIZES["10b-4"] = SIZES["10b"] | {"num_hidden_layers": 4}
RECIPES = {
    "linear": "merge_method: linear\nmodels:\n{weighted2}dtype: bfloat16\n",
    "slerp": "merge_method: slerp\nbase_model: {a}\nmodels:\n- model: {a}\n- model: {b}\n"
    "parameters: {{t: 0.4}}\ndtype: bfloat16\n",
    "ties": "merge_method: ties\nbase_model: {base}\nmodels:\n{weighted3}dtype: bfloat16\n",
}
BLOCK = np.dtype(ml_dtypes.bfloat16)


def make_model(folder: pathlib.Path, config: dict, seed: int) -> None:
    """Writes a model of random weights; those of other seeds have a cosine of 0.9999 with that of seed 0."""
    cfg = model_config(config, "config.json")
    folder.mkdir(parents=True)

    def blocks(shape: tuple[int, ...], number: int) -> Iterator[np.ndarray]:
        for i, rows in enumerate(row_blocks(shape)):
            size = (rows.stop - rows.start, *shape[1:])
            x = 0.02 * np.random.default_rng([0, number, i]).standard_normal(size, np.float32)
            if seed:
                x += 0.0003 * np.random.default_rng([seed, number, i]).standard_normal(size, np.float32)
            yield x.astype(BLOCK)

    pieces = []
    for number, (name, path, _) in enumerate(hf_tensors(cfg)):
        shape = hf_shape(path, cfg)
        pieces.append(Piece(name, shape, BLOCK, functools.partial(blocks, shape, number)))
    write_safetensors(folder / "model.safetensors", pieces)
    (folder / "config.json").write_text(json.dumps(config))


def differing(ours: pathlib.Path, theirs: pathlib.Path) -> tuple[int, int]:
    """Counts the elements whose bits differ, and all elements."""
    a, b = open_checkpoint(str(ours)), open_checkpoint(str(theirs))
    different = total = 0
    for name, shape in a.shape_of.items():
        for rows in row_blocks(shape):
            x, y = (c.read(name, rows).view(np.uint16) for c in (a, b))
            different += int((x != y).sum())
            total += x.size
    return different, total


def show(method: str, name: str, row: dict[str, float]) -> None:
    print(f"{method:<8}{name:<12}" + "".join(f"{row[k]:>10.2f}" for k in ("wall", "cpu", "rss")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="linear,slerp,ties")
    parser.add_argument("--size", choices=SIZES, default="1b")
    args = parser.parse_args()
    work, alone = args.work.resolve(), args.size != "1b"
    work.mkdir(parents=True, exist_ok=True)
    names = ("a", "b") if alone else ("base", "a", "b", "c")
    folders = {name: work / f"{args.size}-{name}" for name in names}
    for seed, (name, folder) in enumerate(folders.items()):
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"making {name}", flush=True)
            make_model(folder, SIZES[args.size], seed)
    weighted = [
        f"- model: {{{name}}}\n  parameters: {{{{weight: {weight}, density: 0.5}}}}\n"
        for name, weight in (("a", 0.4), ("b", 0.6), ("c", 0.3))
    ]
    print(f"{'':<20}{'wall s':>10}{'CPU s':>10}{'peak GiB':>10}")
    for method in args.methods.split(","):
        two = "".join(weighted[:2]).replace(", density: 0.5", "")
        text = RECIPES[method].replace("{weighted2}", two).replace("{weighted3}", "".join(weighted))
        recipe = work / f"{method}.yml"
        recipe.write_text(text.format(**folders))
        ours, theirs = work / "ours", work / "theirs"
        commands = {
            "solar_jax": [sys.executable, "-m", "solar_jax.merge", f"--config={recipe}", f"--out={ours}"],
            "mergekit": [str(pathlib.Path(sys.executable).parent / "mergekit-yaml"), str(recipe), str(theirs)],
        }
        if alone:
            commands = {"solar_jax": commands["solar_jax"], "copy": ["cp", "-r", str(ours), str(theirs)]}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for repeat in range(args.repeats):
            for name in list(commands)[:: -1 if repeat % 2 and not alone else 1]:
                shutil.rmtree(ours if name == "solar_jax" else theirs, ignore_errors=True)
                subprocess.run(["sync"], check=True)
                wait_until_idle(time.monotonic() + 60)
                runs[name].append(measure(commands[name]))
                row = runs[name][-1]
                print(
                    f"{method:<8}{name:<12}" + "".join(f"{row[k]:>10.2f}" for k in ("wall", "cpu", "rss")), flush=True
                )
        median = {name: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for name, rs in runs.items()}
        a, b = median.values()
        print(
            f"{method:<8}{'ratio':<12}" + "".join(f"{a[k] / b[k]:>10.2f}" for k in ("wall", "cpu", "rss")), flush=True
        )
        if not alone:
            different, total = differing(ours, theirs)
            print(f"{method:<8}{different:,} of {total:,} elements differ", flush=True)


if __name__ == "__main__":
    main()
