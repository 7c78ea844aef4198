"""Compares greedy tokens of SmolLM2 in float32 with transformers': alone, in a ragged batch of 16, and joining a batch.

    uv run --extra demo --extra test python scripts/bench/decode_check.py [--prompts 50] [--new 200]

Prompts are beginnings of Python's documentation, of 5 to 150 tokens. Where tokens differ, the gap between the two most
likely ones at that place is printed: below 1e-3 it is a tie, which rounding decides.
"""

import argparse
import pathlib
import pydoc_data.topics
import tempfile

import torch
import transformers

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.engine import Request
from solar_jax.decoding.model import load_model

TIE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(2)
    c = open_checkpoint("smollm2")
    model = load_model(c, "float32")
    texts = list(pydoc_data.topics.topics.values())
    prompts = [tuple(model.encode(text)[: 5 + 29 * i % 146]) for i, text in enumerate(texts[: args.prompts])]
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(c, Target(pathlib.Path(folder) / "model", dtype="float32"), "convert")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        made = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=args.new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(made[0, len(prompt) :].tolist())
    for name, rows in (("alone", 1), ("in a ragged batch of 16, joining as others leave", 16)):
        engine = model.engine(rows=rows)
        engine.ends = frozenset()
        # Answers of unlike length, so that rows become free one by one and the next prompts join a running batch.
        requests = [Request(prompt, args.new - (i * 7 % 60 if rows > 1 else 0)) for i, prompt in enumerate(prompts)]
        found = [answer.tokens for _, answer in sorted(engine.answers(requests))]
        ties, wrong = [], []
        for i, (tokens, wanted) in enumerate(zip(found, expected, strict=True)):
            if (
                at := next((k for k, pair in enumerate(zip(tokens, wanted, strict=False)) if pair[0] != pair[1]), None)
            ) is None:
                continue
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompts[i], *wanted[:at]]])).logits[0, -1]
            gap = float(logits.topk(2).values.diff().abs())
            (ties if gap < TIE else wrong).append((i, at, gap))
        same = len(prompts) - len(ties) - len(wrong)
        print(f"{name}: {same} of {len(prompts)} equal, {len(ties)} leave at a tie {ties}, others {wrong}", flush=True)


if __name__ == "__main__":
    main()
