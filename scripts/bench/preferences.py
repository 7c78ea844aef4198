"""Compares preference losses, rewards and gradients with TRL's DPO trainer on real pairs.

    python scripts/bench/preferences.py FILE... [--pairs 64] [--length 1024]

A small random Llama with SmolLM2's tokens and template, and another one as its reference; the first pairs of the files
that are not left out, 8 a batch, in rows of `--length` tokens here, padded to the longest there. Prints, for each loss,
the largest differences over all batches: of loss and rewards, and of gradients relative to their norm; ends with an
error above 1e-4.
"""

import argparse
import itertools
import os
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.config import DataConfig, MeshConfig, PreferenceConfig, TrainConfig
from solar_jax.data.chat.encoding import LeftOut, Rules, load_rules
from solar_jax.data.chat.pairs import pairs_of, row_with
from solar_jax.data.chat.rows import pack_records
from solar_jax.data.files import find_files
from solar_jax.data.readers import WHOLE, read_documents
from solar_jax.data.sources import Document
from solar_jax.parallel.mesh import make_mesh
from solar_jax.training.preferences import make_loss, preference_objective
from solar_jax.training.step import make_forward

LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sft")
BETA, BOUND, BATCH = 0.1, 1e-4, 8


def documents(files: list[str], count: int, rules: Rules, length: int) -> list[Document]:
    """The first pairs of the files, in turns, that are used as they are."""
    readers = [read_documents(find_files(file).files[0], WHOLE) for file in files]
    found: list[Document] = []
    for number, record in itertools.chain.from_iterable(zip(*readers, strict=False)):
        document = Document(f"pair:{number}:{len(found)}", "", record)
        try:
            sides = rules.encode(document, length)
        except LeftOut:
            continue
        if len(found) < count and all(len(side.tokens) <= length // 2 for side in sides):
            found.append(document)
    return found


def small_model(seed: int, vocabulary: int, folder: str | None = None) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=4096, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    if folder:
        model.save_pretrained(folder)
    return model


def of_trl(batch: list[Document], rules: Rules, length: int) -> dict[str, torch.Tensor]:
    """The padded batch that TRL's collator makes: all chosen sequences, then all rejected ones."""
    sides = [rules.encode(d, length) for d in batch]
    ordered = [pair[0] for pair in sides] + [pair[1] for pair in sides]
    longest = max(len(e.tokens) for e in ordered)

    def padded(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.stack([np.pad(x, (0, longest - len(x))) for x in arrays])).long()

    return {
        "input_ids": padded([e.tokens for e in ordered]),
        "attention_mask": padded([np.ones_like(e.tokens) for e in ordered]),
        "completion_mask": padded([e.trained for e in ordered]),
    }


def of_ours(rows: Any, reference: Any, most: int) -> dict[str, jax.Array]:
    """The packed rows, with the reference's log-probabilities as torch computes them, and empty rows up to `most`."""
    known: dict[str, tuple[float, float]] = {}
    for i in range(len(rows)):
        for key, (tokens, sizes, trained) in pairs_of(rows, i):
            sums = []
            for part in (slice(0, int(sizes[0])), slice(int(sizes[0]), None)):
                ids, marks = torch.tensor(tokens[part].astype(np.int64))[None], trained[part]
                with torch.no_grad():
                    picked = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
                sums.append(float(picked[marks[1:]].sum()))
            known[key] = sums[0], sums[1]
    made = [row_with(rows, i, known) for i in range(len(rows))]
    made += [{name: np.zeros_like(x) for name, x in made[0].items()}] * (most - len(made))
    return {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}


def gradients_apart(gradient: Any, model: Any) -> list[float]:
    """Distances of gradients, relative to TRL's norms."""
    pairs = [(np.asarray(gradient["embed"]), model.model.embed_tokens.weight.grad.numpy())]
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_proj", "down_proj"):
            pairs.append((np.asarray(gradient["layers"][name][i]).T, getattr(layer.mlp, name).weight.grad.numpy()))
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    source, folder = open_checkpoint("smollm2"), tempfile.mkdtemp()
    tokenizer = load_tokenizer(source)
    rules = load_rules(DataConfig(format="pairs"), source.companions, "smollm2", tokenizer, 2)
    assert rules is not None
    model = small_model(0, source.cfg.vocab_size, folder)
    reference = small_model(1, source.cfg.vocab_size)
    for name, content in source.companions.items():
        with open(f"{folder}/{name}", "wb") as f:
            f.write(content)
    chosen = documents(args.files, args.pairs, rules, args.length)
    batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    packed = [pack_records(batch, rules, args.length)[0] for batch in batches]
    most = max(map(len, packed))

    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False, beta=BETA,
        max_length=None, label_smoothing=0.1,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=reference, args=settings, processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
    )  # fmt: skip

    theirs = [of_trl(batch, rules, args.length) for batch in batches]
    ours = [of_ours(rows, reference, most) for rows in packed]
    c, mesh = open_checkpoint(folder), make_mesh(MeshConfig())
    params = load_params(c, None, np.float32)
    train = TrainConfig(steps=1, batch_size=most, remat="full", precision="float32")
    forward = make_forward(c.cfg, train, args.length, mesh)
    print(f"{len(chosen)} pairs in {sum(map(len, packed))} rows of {args.length}")
    worst = 0.0
    for name in LOSSES:
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        loss = make_loss(PreferenceConfig(losses=(name,), beta=BETA, label_smoothing=0.1 * (name == "robust")))
        objective = preference_objective(loss, args.length)

        def mean(params: Any, batch: Any, objective: Any = objective) -> Any:
            total, count, sums = objective.loss(forward(params), objective.whole(batch))
            return total / count, {key: value / count for key, value in sums.items()}

        step = jax.jit(jax.value_and_grad(mean, has_aux=True))
        values, of_loss, of_rest = [], 0.0, 0.0
        for batch, row_batch in zip(theirs, ours, strict=True):
            model.zero_grad()
            expected = trainer.compute_loss(model, dict(batch))
            expected.backward()
            (value, sums), gradient = step(params, row_batch)
            values.append(float(value))
            of_loss = max(of_loss, abs(values[-1] - expected.detach().item()))
            if loss.needs_reference:
                logged = {key: found[-1] for key, found in trainer._metrics["eval"].items() if "rewards/" in key}
                of_rest = max(of_rest, *(abs(float(sums[key]) - logged[key]) for key in logged))
            of_rest = max(of_rest, *gradients_apart(gradient, model))
        worst = max(worst, of_loss, of_rest)
        print(
            f"{name:<14}mean loss {np.mean(values):9.5f}, differs by {of_loss:.1e}; rewards and gradients by "
            f"{of_rest:.1e}",
            flush=True,
        )
    if worst > BOUND:
        raise SystemExit(f"error: the largest difference is {worst:.1e}, above {BOUND:g}.")


if __name__ == "__main__":
    main()
