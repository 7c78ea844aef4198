"""Times a training step of a Llama on a GPU next to torch (transformers, torch.compile, SDPA) on the same GPU.

    python scripts/bench/gpu_step.py --shape 1b [--rounds 3]     in an environment with the extra test and jax[cuda13]
    python scripts/bench/gpu_step.py --device cpu                the same code on a tiny shape, as a smoke test only

Both start from the same random weights, see the same random tokens, keep weights and AdamW's state in float32 and
multiply in bfloat16. They take turns, each in its own process with the GPU to itself: warm-up, then timed steps.
The median over all turns counts. MFU uses `model.flops.flops_per_token` and the GPU's dense bfloat16 peak.
"""

import argparse
import os
import statistics
import sys
from typing import Any

import interleaved

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# name -> (HF config, rows, tokens a row, `remat` of ours): sized for 80 GB, 16 bytes per parameter for the state alone
SHAPES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    # Llama 3.2 1B
    "1b": ({
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 2048, "rope_theta": 500000.0,
    }, 4, 2048, "matmuls"),
    # Mistral 7B's layers, 12 of 32
    "7b": ({
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 12, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "rope_theta": 10000.0,
    }, 1, 4096, "matmuls"),
    "tiny": ({
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": False,
        "max_position_embeddings": 64, "rope_theta": 10000.0,
    }, 2, 64, "matmuls"),
}  # fmt: skip
TOLERANCE = 0.02  # nats, of the first step's loss, which bfloat16 rounds in different places
PROGRAMS = ("solar_jax", "torch")


def random_checkpoint(hf_config: dict[str, Any]):  # -> Checkpoint; its import is for the programs' own processes
    """Returns a checkpoint whose tensors are sampled when they are read, each from its own seed."""
    import zlib

    import numpy as np

    from solar_jax.checkpoints.checkpoint import Checkpoint
    from solar_jax.checkpoints.hf_config import model_config
    from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors

    cfg = model_config(hf_config, "the shape")
    shape_of = {name: hf_shape(path, cfg) for name, path, _ in hf_tensors(cfg)}

    def read(name: str, rows: slice = slice(None)):
        if len(shape_of[name]) == 1:
            return np.ones(shape_of[name], np.float32)[rows]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return (0.02 * rng.standard_normal(shape_of[name], np.float32))[rows]

    dtypes = dict.fromkeys(shape_of, np.dtype(np.float32))
    return Checkpoint("the shape", hf_config, cfg, {}, shape_of, dtypes, read)


def work(shape: str):  # -> programs.Work
    """Builds a shape's model and batches with the recipe's optimiser."""
    import numpy as np
    from programs import Work

    from solar_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig

    keys, rows, length, remat = SHAPES[shape]
    train = TrainConfig(steps=1000, batch_size=rows, remat=remat, precision="mixed")
    config = Config(data=DataConfig(sequence_length=length), train=train, optimizer=OptimizerConfig())
    rng, place = np.random.default_rng(0), np.arange(length, dtype=np.int32)
    batches = []
    for _ in range(4):
        tokens = rng.integers(0, keys["vocab_size"], (rows, length + 1), dtype=np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": np.tile(place, (rows, 1))}
        batch |= {"segment_ids": np.zeros_like(tokens[:, 1:]), "weights": np.ones((rows, length), np.float32)}
        batches.append(batch)
    return Work(random_checkpoint(COMMON | keys), config, batches)


def serve(program: str, shape: str, device: str) -> None:
    """Runs one of the programs, in its own process."""
    from programs import ours, theirs

    if program == "solar_jax":
        import jax

        if device == "cuda" and jax.devices()[0].platform != "gpu":
            raise SystemExit("error: jax finds no GPU; install its CUDA packages (pip install 'jax[cuda13]').")
        interleaved.serve(*ours(work(shape)), jax.devices()[0].device_kind)
    else:
        interleaved.serve(*theirs(work(shape), "sdpa", True, device))


def report(shape: str, spent: dict[str, list[float]], kind: str) -> None:
    """Prints the table: medians, tokens/s, MFU."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU is the programs'
    from solar_jax.checkpoints.hf_config import model_config
    from solar_jax.hardware.chips import GPU_PEAK_FLOPS
    from solar_jax.model.flops import flops_per_token, mfu
    from solar_jax.model.shapes import parameter_count

    keys, rows, length, _ = SHAPES[shape]
    cfg = model_config(COMMON | keys, "the shape")
    print(f"\n{shape}: {parameter_count(cfg):,} parameters, {rows} x {length} tokens, {kind}")
    for name, seconds in spent.items():
        wall = statistics.median(seconds)
        used = mfu(rows * length / wall, flops_per_token(cfg, length), GPU_PEAK_FLOPS.get(kind), 1)
        share = "unknown" if used is None else f"{100 * used:.1f} %"
        print(f"{name:<10}{1000 * wall:9.1f} ms  {rows * length / wall:9,.0f} tokens/s  MFU {share}")
    ratio = statistics.median(spent["solar_jax"]) / statistics.median(spent["torch"])
    print(f"solar_jax takes {ratio:.2f} times torch's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="1b; on a CPU tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="steps of each turn that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="of each turn")
    parser.add_argument("--profile", action="store_true", help="also print where each program's time goes")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = args.shape or ("1b" if args.device == "cuda" else "tiny")
    if args.program:
        return serve(args.program, shape, args.device)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("error: torch finds no GPU on this machine; --device cpu only smoke-tests the code.")

    cpu = {"JAX_PLATFORMS": "cpu"}
    environment = {"solar_jax": cpu if args.device == "cpu" else {}, "torch": cpu}
    spent: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    first, profiles, kind = {}, {}, ""
    for number in range(args.rounds):
        for name in PROGRAMS[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, f"--program={name}", f"--shape={shape}", f"--device={args.device}"]
            program = interleaved.Program(name, command, environment[name])
            steps = [program.turn() for _ in range(args.warmup + args.steps)]
            first[name], kind = steps[0]["loss"], program.about or kind
            if args.profile and number == args.rounds - 1:
                profiles[name] = program.profile()
            program.close()
            walls = [t["wall"] for t in steps[args.warmup :]]
            spent[name] += walls
            wall = 1000 * statistics.median(walls)
            print(f"{number + 1} {name:<10}{wall:9.1f} ms  first loss {first[name]:.4f}", flush=True)
    report(shape, spent, kind)
    print(f"the first step's losses differ by {abs(first['solar_jax'] - first['torch']):.1e}")
    for name, profile in profiles.items():
        print(f"\n{name}, one step more\n{profile}")
    if abs(first["solar_jax"] - first["torch"]) > TOLERANCE:
        raise SystemExit(f"error: the first losses differ by more than {TOLERANCE}.")
    return None


if __name__ == "__main__":
    main()
