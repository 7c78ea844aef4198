"""Times greedy decoding of SmolLM2 in float32 next to transformers, each in its own process, in turns.

    uv run --extra demo --extra test python scripts/bench/decode.py [--rows 1] [--repeats 5] [--llama PYTHON]

A turn is a prompt of 64 tokens in each row and `--new` tokens after it; decode steps alone are counted, all with two
threads. Also prints the share of the read bandwidth of memory, measured afterwards, that one read of all weights a step
comes to. `--llama` is the python of an environment with xllamacpp and gguf, for llama.cpp beside both.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

THREADS, PROMPT = 2, 64
TEXT = "The history of a city is the history of its people, and of the rivers and roads by which they came. " * 4


def ours(rows: int, new: int) -> None:
    import jax
    from interleaved import serve

    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.decoding.engine import Request
    from solar_jax.decoding.model import load_model

    model = load_model(open_checkpoint("smollm2"), "float32")
    engine = model.engine(rows=rows)
    engine.ends = frozenset()
    prompt = tuple(model.encode(TEXT)[:PROMPT])

    def step(_: int) -> dict[str, float]:
        for _ in range(rows):
            engine.submit(Request(prompt, new + 2))
        engine.step()  # prefill, and the first decoded token
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(new):
            engine.step()
        return {"decode": time.perf_counter() - begin, "decode_cpu": time.process_time() - cpu}

    serve(step, lambda: "", f"jax {jax.__version__}")


def transformers_side(rows: int, new: int, folder: str) -> None:
    import torch
    import transformers
    from interleaved import serve

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([tokenizer(TEXT)["input_ids"][:PROMPT]] * rows)

    @torch.inference_mode()
    def step(_: int) -> dict[str, float]:
        cache = transformers.DynamicCache(config=model.config)
        token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(new):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        return {"decode": time.perf_counter() - begin, "decode_cpu": time.process_time() - cpu}

    serve(step, lambda: "", f"torch {torch.__version__}")


def bandwidth() -> float:
    """Bytes per second at which two threads read memory: the best of five sums over 1 GiB."""
    import concurrent.futures

    import numpy as np

    halves = np.split(np.ones(1 << 27, np.int64), THREADS)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.sum, halves))
            best = min(best, time.perf_counter() - begin)
    return sum(x.nbytes for x in halves) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120.0)
    parser.add_argument("--llama", default="", help="python of an environment with xllamacpp and gguf")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        ours(args.rows, args.new) if args.side == "ours" else transformers_side(args.rows, args.new, args.folder)
        return
    from interleaved import Program, alternate

    from solar_jax.checkpoints.convert import Target, convert_checkpoint
    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.checkpoints.tokenizer import load_tokenizer
    from solar_jax.model.shapes import parameter_count

    c = open_checkpoint("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(c, Target(pathlib.Path(folder) / "model"), "convert")
        command = [sys.executable, __file__, f"--rows={args.rows}", f"--new={args.new}", f"--folder={folder}/model"]
        environment = {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
        programs = [Program(name, [*command, f"--side={name}"], environment) for name in ("ours", "transformers")]
        if args.llama:
            prompt = pathlib.Path(folder) / "prompt.txt"
            tokenizer = load_tokenizer(c)
            prompt.write_text(tokenizer.decode(tokenizer.encode(TEXT).ids[:PROMPT]))
            script = pathlib.Path(__file__).with_name("llama_cpp.py")
            own = [args.llama, str(script), str(c.files[0]), str(args.rows), str(args.new), str(prompt)]
            programs.append(Program("llama.cpp", own, environment))
        counted = alternate(programs, 1, args.repeats, args.patience)
    speed = bandwidth()
    print(f"\n{'':<14}{'tokens/s':>10}{'CPU s':>8}{'of the read bandwidth':>24}")
    rate = {}
    for program in programs:
        seconds = program.median("decode", counted) / args.new
        rate[program.name] = args.rows / seconds
        share = 4 * parameter_count(c.cfg) / seconds / speed
        cpu = program.median("decode_cpu", counted)
        print(f"{program.name:<14}{rate[program.name]:>10.1f}{cpu:>8.1f}{share:>24.2f}")
        program.close()
    print(f"{rate['ours'] / rate['transformers']:.2f} times transformers; {speed / 1e9:.1f} GB/s read")


if __name__ == "__main__":
    main()
