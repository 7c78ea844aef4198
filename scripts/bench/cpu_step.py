"""Times a training step of SmolLM2-135M on this machine's CPU, side by side with transformers on torch.

    uv run --extra demo --extra test python scripts/bench/cpu_step.py [--repeats 7] [--profile]

Uses the recipe of configs/dus_48l.py:smollm2 on the base model: 30 layers, 4 rows of 256 tokens, float32, AdamW. Both
start from the same weights, see the same batches, and must have the same losses. They take turns in their own
processes; torch runs with each of its attention implementations, of which the fastest counts. A turn waits until other
processes leave the CPUs idle, and disturbed rounds are not counted, for `--patience` seconds in total.
"""

import argparse
import os
import pathlib
import runpy
import sys

import interleaved

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 1e-4  # nats, of the first step's loss: later ones also differ because Adam amplifies rounding
PEERS = ("sdpa", "eager", "compile")  # torch: attention implementations, and torch.compile of sdpa


def work(steps: int):  # -> programs.Work; what it imports is for the programs' own processes
    """Builds the recipe's first batches."""
    import numpy as np
    from programs import Work

    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
    from solar_jax.config import resolve
    from solar_jax.data.corpus import load_corpus
    from solar_jax.data.pipeline import training_rows

    config = resolve(runpy.run_path(str(ROOT / "configs" / "dus_48l.py"))["get_config"]("smollm2"))
    checkpoint = open_checkpoint(config.source)
    rows = training_rows(load_corpus(config.data, load_tokenizer(checkpoint), eos_id(checkpoint)), config.seed)
    size = config.train.batch_size
    batches = [[rows[step * size + i] for i in range(size)] for step in range(steps)]
    return Work(checkpoint, config, [{k: np.stack([r[k] for r in b]) for k in b[0]} for b in batches])


def serve(program: str, steps: int, options: str) -> None:
    """Runs one of the programs, in its own process."""
    from programs import ours, theirs

    if program == "solar_jax":
        chosen = dict(o.split("=", 1) for o in options.split(",") if o)
        interleaved.serve(*ours(work(steps), chosen))
    else:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        interleaved.serve(*theirs(work(steps), "eager" if program == "eager" else "sdpa", program == "compile", "cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--patience", type=float, default=600, help="seconds, for idle CPUs")
    parser.add_argument("--peers", default="sdpa,eager", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--options", default="", help="NAME=VALUE,... for XLA beside those that a run gives it")
    parser.add_argument("--profile", action="store_true", help="also print where each program's time goes")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        return serve(args.program, args.warmup + args.repeats, args.options)

    def start(name: str, program: str) -> interleaved.Program:
        command = [sys.executable, __file__, "--program", program, "--options", args.options]
        command += [f"--warmup={args.warmup}", f"--repeats={args.repeats}"]
        return interleaved.Program(name, command, {"JAX_PLATFORMS": "cpu"})

    one = start("solar_jax", "solar_jax")
    peers = [start(f"torch {peer}", peer) for peer in args.peers.split(",")]
    rounds = interleaved.alternate([one, *peers], args.warmup, args.repeats, args.patience)
    print(f"\nmedians of {args.repeats}, 4 x 256 tokens, {os.cpu_count()} CPUs")
    for p in (one, *peers):
        wall, cpu, others = (p.median(key, rounds) for key in ("wall", "cpu", "others"))
        print(f"{p.name:<16}{wall:8.3f} s  {1024 / wall:6.0f} tokens/s  CPU {cpu:6.2f} s  others {100 * others:.0f} %")
    best = min(peers, key=lambda p: p.median("wall", rounds))
    ratio = one.median("wall", rounds) / best.median("wall", rounds)
    first = abs(one.turns[0]["loss"] - best.turns[0]["loss"])
    print(f"solar_jax takes {ratio:.2f} times {best.name}'s")
    print(
        f"losses differ by {first:.1e} in the first step, "
        f"by at most {interleaved.loss_difference(one, best):.1e} in any"
    )
    if args.profile:
        for p in (one, best):
            print(f"\n{p.name}, one step more\n{p.profile()}")
    for p in (one, *peers):
        p.close()
    if first > TOLERANCE:
        raise SystemExit(f"error: the first losses differ by more than {TOLERANCE}.")
    return None


if __name__ == "__main__":
    main()
