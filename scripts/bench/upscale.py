"""Times depth up-scaling of a checkpoint on disk, next to mergekit's passthrough merge of the same layers.

    uv run --extra demo python scripts/bench/upscale.py --work DIR [--repeats 3] [--source FOLDER]

DIR needs 60 GB for the default source, a Mistral-7B of random bfloat16 weights that is created there. mergekit is
installed into its own environment under DIR. Each repeat runs both programs, in turns, each into a fresh target
folder; the outputs are then compared tensor by tensor. A plain copy of as many bytes gives the disk's own speed.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from solar_jax.checkpoints.checkpoint import row_blocks
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Piece, write_safetensors

CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    "sliding_window": 4096,
}  # fmt: skip
MERGE = """\
slices:
  - sources: [{{model: "{source}", layer_range: [0, {a}]}}]
  - sources: [{{model: "{source}", layer_range: [{m}, {n}]}}]
merge_method: passthrough
dtype: bfloat16
"""


def make_source(folder: pathlib.Path) -> None:
    """Creates a Mistral-7B of random weights: 14.5 GB of bfloat16 in three files."""
    from solar_jax.checkpoints.hf_config import model_config

    cfg = model_config(CONFIG, "config.json")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files: list[list[Piece]] = [[]]
    dtype = np.dtype(ml_dtypes.bfloat16)
    for name, path, _ in hf_tensors(cfg):
        shape = hf_shape(path, cfg)

        def blocks(shape=shape):
            for rows in row_blocks(shape):
                size = (rows.stop - rows.start, *shape[1:])
                yield (0.02 * rng.standard_normal(size, dtype=np.float32)).astype(dtype)

        if sum(p.nbytes for p in files[-1]) > 4.8e9:
            files.append([])
        files[-1].append(Piece(name, shape, dtype, blocks))
    weight_map = {}
    for i, pieces in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / file, pieces)
        weight_map |= {p.name: file for p in pieces}
    index = {"metadata": {"total_size": sum(p.nbytes for f in files for p in f)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; returns its wall and CPU seconds and peak resident GiB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    tail = process.stderr.read()[-2000:]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{tail.decode(errors='replace')}")
    return {
        "wall": time.perf_counter() - begin,
        "cpu": usage.ru_utime + usage.ru_stime,
        "rss": usage.ru_maxrss / 2**20,
    }


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of every tensor."""
    c = open_checkpoint(str(folder))
    out = {}
    for name, shape in c.shape_of.items():
        digest = hashlib.sha256(f"{shape} {c.dtype_of[name]}".encode())
        for rows in row_blocks(shape):
            digest.update(np.ascontiguousarray(c.read(name, rows)).view(np.uint8).data)
        out[name] = digest.hexdigest()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--source", type=pathlib.Path, help="an HF folder; made under --work if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--m", type=int, default=8)
    parser.add_argument("--mergekit", type=pathlib.Path, help="mergekit-yaml; installed under --work if not given")
    args = parser.parse_args()
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    source = args.source or work / "mistral-7b"
    if not source.exists():
        print(f"making {source}", flush=True)
        make_source(source)
    mergekit = args.mergekit or work / "mergekit" / "bin" / "mergekit-yaml"
    if not mergekit.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, work / "mergekit"], check=True)
        python = work / "mergekit" / "bin" / "python"
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, "mergekit"], check=True)
    n = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    (work / "merge.yml").write_text(MERGE.format(source=source.resolve(), a=n - args.m, m=args.m, n=n))
    ours, theirs, copied = work / "ours", work / "theirs", work / "copied"
    commands = {
        "solar_jax": [
            sys.executable, "-m", "solar_jax.upscale", f"--source={source}", f"--out={ours}", "--operator=dus",
            f"--m={args.m}",
        ],
        "mergekit": [str(mergekit), str(work / "merge.yml"), str(theirs), "--no-copy-tokenizer"],
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for repeat in range(args.repeats):
        for name in list(commands)[:: 1 if repeat % 2 == 0 else -1]:
            target = ours if name == "solar_jax" else theirs
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            runs[name].append(measure(commands[name]))
            print(
                f"{repeat + 1} {name:<10}" + "".join(f"  {k} {v:7.2f}" for k, v in runs[name][-1].items()), flush=True
            )
    size = sum(f.stat().st_size for f in ours.glob("*.safetensors"))
    same = digests(ours) == digests(theirs)
    shutil.rmtree(theirs)
    os.sync()
    plain = []
    for _ in range(args.repeats):
        shutil.rmtree(copied, ignore_errors=True)
        os.sync()
        plain.append(measure(["sh", "-c", f"cp -r {ours} {copied} && sync"])["wall"])
    shutil.rmtree(copied)
    median = {name: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for name, rs in runs.items()}
    a, b = median["solar_jax"], median["mergekit"]
    print(f"\nmedians of {args.repeats}, {size / 1e9:.1f} GB written")
    print(f"{'':<12}{'wall s':>10}{'CPU s':>10}{'peak GiB':>10}")
    for name, row in median.items():
        print(f"{name:<12}{row['wall']:>10.1f}{row['cpu']:>10.1f}{row['rss']:>10.2f}")
    print(f"{'ratio':<12}{a['wall'] / b['wall']:>10.2f}{a['cpu'] / b['cpu']:>10.2f}{a['rss'] / b['rss']:>10.2f}")
    print(f"cp of the result: {statistics.median(plain):.1f} s; share of its speed reached: ", end="")
    print(f"{statistics.median(plain) / a['wall']:.2f}")
    print(f"tensors bitwise equal: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"error: {e}") from e
