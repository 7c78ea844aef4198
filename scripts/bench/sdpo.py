"""Compares stepwise DPO, one-pass DPO and random chunks on the same pairs and budget, with seeds, on SmolLM2-135M.

    python scripts/bench/sdpo.py --pairs 'A.jsonl?limit=16000' 'B.jsonl?limit=24000' --work DIR [--seeds 3]

Every arm makes one pass over the same pairs, in rows of 512 tokens, 4 rows a step, with the same schedule (a chunk has
its own). Held-out pairs are measured against the start, before and after: loss, preference accuracy with its standard
error, margin of rewards, probability of the token that ends an answer. The reference's log-probabilities of the start
are computed once for all arms. About 3 minutes an arm and seed on 2 cores.
"""

import argparse
import json
import pathlib
import statistics

from solar_jax import train
from solar_jax.config import Config, defaults, resolve

ARMS = {"one pass": "", "sDPO, by source": "source", "random chunks": "random:2"}
SHOWN = ("loss", "accuracy", "margin", "end_probability")


def config_of(pairs: list[str], work: pathlib.Path, seed: int, chunks: str, args: argparse.Namespace) -> Config:
    config = defaults()
    config.name, config.source, config.seed = "sdpo", args.source, seed
    config.growth.operator = "identity"
    config.data.sources, config.data.format = tuple(pairs), "pairs"
    config.data.sequence_length, config.data.holdout_every = 512, 3
    config.preferences.beta, config.preferences.chunks = args.beta, chunks
    config.preferences.cache = str(work / "reference")
    config.train.epochs, config.train.batch_size = 1.0, 4
    config.train.remat, config.train.precision = "matmuls", "float32"
    config.optimizer.learning_rate, config.optimizer.schedule = args.learning_rate, "cosine"
    config.optimizer.warmup_fraction, config.optimizer.weight_decay, config.optimizer.final_fraction = 0.1, 0.0, 0.0
    config.evaluation.windows, config.evaluation.batch_size = args.windows, 8
    config.checkpoint.every, config.checkpoint.keep, config.export.dtype = 1000, 1, "float32"
    return resolve(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--windows", type=int, default=24, help="held-out rows")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    start: dict[str, float] = {}
    for seed in range(args.seeds):
        for name, chunks in ARMS.items():
            folder = args.work / f"{chunks.partition(':')[0] or 'one'}-{seed}"
            summary = train.run(config_of(args.pairs, args.work, seed, chunks, args), folder)
            start = {key: summary["zero_token_loss" if key == "loss" else f"start_{key}"] for key in SHOWN}
            found[name].append({key: summary[f"final_{key}"] for key in SHOWN})
            print(
                json.dumps({"arm": name, "seed": seed, "pairs": summary["final_pairs"]} | found[name][-1]), flush=True
            )
    print(f"\n{'':<18}" + "".join(f"{key:>24}" for key in SHOWN))
    print(f"{'start':<18}" + "".join(f"{start[key]:>24.4f}" for key in SHOWN))
    for name, runs in found.items():
        cells = []
        for key in SHOWN:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} +- {spread:.4f}")
        print(f"{name:<18}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
