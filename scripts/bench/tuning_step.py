"""Times a step of DPO or SFT of SmolLM2-135M on this machine's CPU, side by side with TRL's trainers.

    uv run --extra demo --extra test python scripts/bench/tuning_step.py [--kind dpo] [--repeats 5] [--remat full]

DPO: 2 pairs, each side 512 tokens of which 448 are an answer; SFT: 2 rows of 512 tokens. float32, AdamW, the same
weights and tokens, layers recomputed in the backward pass on both sides (gradient checkpointing). TRL's reference is a
second model, its default, or computed beforehand (`--peers precomputed`). Both take turns in their own processes; a
turn waits until other processes leave the CPUs idle. Losses must agree. Peak memory is that of the process.
"""

import argparse
import os
import resource
import sys

import interleaved

TOLERANCE = 1e-4
SIDE, PROMPT = 512, 64  # tokens
CONFIG = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
BETA = 0.1


def tokens():
    """[4, SIDE + 1] tokens of text; sequences 0 and 1 are one pair or row each with 2 and 3."""
    import numpy as np

    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.checkpoints.tokenizer import load_tokenizer
    from solar_jax.data.embedded import topics

    tokenizer = load_tokenizer(open_checkpoint("smollm2"))
    text = " ".join(text for _, text in topics())[: SIDE * 60]
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids[: 4 * (SIDE + 1)], np.int32)
    ids = ids.reshape(4, SIDE + 1)
    ids[2, :PROMPT], ids[3, :PROMPT] = ids[0, :PROMPT], ids[1, :PROMPT]  # a pair shares its prompt
    return ids


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"


def ours(kind: str, remat: str):
    """This package's step, as a run compiles it."""
    import dataclasses

    import jax
    import numpy as np

    from solar_jax.checkpoints.load import load_params
    from solar_jax.checkpoints.open import open_checkpoint
    from solar_jax.config import defaults, resolve
    from solar_jax.hardware import chips
    from solar_jax.model.precision import precision
    from solar_jax.parallel import rules
    from solar_jax.parallel.mesh import make_mesh
    from solar_jax.training.objectives import next_token
    from solar_jax.training.optimizer import make_optimizer
    from solar_jax.training.preferences import make_loss, preference_objective, sequence_sums
    from solar_jax.training.state import state_shardings
    from solar_jax.training.step import make_forward, make_train_step

    config = defaults()
    config.name, config.source = "bench", "smollm2"
    config.train.steps, config.train.batch_size = 100, 2
    config.train.precision, config.train.remat = "float32", remat
    config.optimizer.learning_rate, config.optimizer.schedule = CONFIG["lr"], "constant"
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.0, 1.0
    config = resolve(config)
    checkpoint, mesh = open_checkpoint("smollm2"), make_mesh(config.mesh)
    cfg, ids = checkpoint.cfg, tokens()
    optimizer = make_optimizer(config.optimizer, 100, precision(config.train))
    shardings = state_shardings(cfg, optimizer, mesh)
    params = load_params(checkpoint, shardings["params"], np.float32)
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=shardings["opt_state"])(params)}
    sides = [[0, 2], [1, 3]] if kind == "dpo" else [[0], [1]]
    length = SIDE * len(sides[0])
    batch = {
        "tokens": np.stack([np.concatenate([ids[i, :-1] for i in row]) for row in sides]),
        "targets": np.stack([np.concatenate([ids[i, 1:] for i in row]) for row in sides]),
        "positions": np.tile(np.arange(SIDE, dtype=np.int32), (2, len(sides[0]))),
        "segment_ids": np.tile(np.repeat(np.arange(len(sides[0]), dtype=np.int32), SIDE), (2, 1)),
        "weights": np.tile((np.arange(1, SIDE + 1) >= PROMPT).astype(np.float32), (2, len(sides[0]))),
    }
    objective = next_token
    if kind == "dpo":
        objective = preference_objective(make_loss(config.preferences), length)
        forward = make_forward(cfg, config.train, length, mesh)
        sums = np.asarray(jax.jit(lambda p, b: sequence_sums(forward(p), b, 2))(params, batch))
        batch["reference"] = np.zeros((2, length), np.float32)
        batch["reference"][:, ::SIDE] = sums
    del params
    batch = jax.device_put(batch, rules.batch_sharding(mesh))
    train = dataclasses.replace(config.train, accumulation=1)
    step = make_train_step(cfg, train, length, optimizer, mesh, objective=objective)
    compiled = step.lower(state, batch).compile(dict(chips.compiler_options(jax.devices()[0])) or None)

    def take(number: int) -> float:
        nonlocal state
        state, measured = compiled(state, batch)
        jax.block_until_ready(state)
        return float(measured["loss"])

    return take, peak


def theirs(kind: str, precomputed: bool):
    """TRL's loss, torch's backward pass and AdamW."""
    import tempfile

    import datasets
    import numpy as np
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from solar_jax.checkpoints.open import open_checkpoint

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    checkpoint = open_checkpoint("smollm2")
    folder = tempfile.mkdtemp()
    for name, content in checkpoint.companions.items():
        with open(f"{folder}/{name}", "wb") as f:
            f.write(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def model():
        config = transformers.AutoConfig.for_model(**checkpoint.hf_config)
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        weights = {n: torch.from_numpy(np.array(checkpoint.read(n), np.float32)) for n in checkpoint.shape_of}
        made.load_state_dict(weights, strict=False)
        return made

    ids = torch.from_numpy(tokens().astype(np.int64))
    common = {
        "output_dir": folder, "report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": True,
        "per_device_train_batch_size": 2, "max_length": None,
    }  # fmt: skip
    mask = (torch.arange(SIDE + 1) >= PROMPT).long().expand(len(ids), -1)
    if kind == "dpo":
        data = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
        args = DPOConfig(beta=BETA, precompute_ref_log_probs=precomputed, **common)
        reference = None if precomputed else model()
        trainer = DPOTrainer(model(), ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        if precomputed:
            with torch.no_grad():
                picked = trainer.model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            sums = (picked * mask[:, 1:]).sum(1)
            batch |= {"ref_chosen_logps": sums[:2], "ref_rejected_logps": sums[2:]}
            del picked
    else:
        data = datasets.Dataset.from_list([{"text": "a b"}] * 2)
        trainer = SFTTrainer(model(), args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
        ids, mask = ids[:2], mask[:2]
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trained = trainer.model.train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained.parameters(), **CONFIG)

    def take(number: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(trained, dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return take, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--patience", type=float, default=300, help="seconds, for idle CPUs")
    parser.add_argument("--remat", default="full", help="of this package; full is TRL's checkpointing")
    parser.add_argument("--peers", default="trl", help="trl, precomputed, or both")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program == "solar_jax":
        return interleaved.serve(*ours(args.kind, args.remat))
    if args.program:
        return interleaved.serve(*theirs(args.kind, args.program == "precomputed"))

    def start(name: str) -> interleaved.Program:
        command = [sys.executable, __file__, "--program", name, "--kind", args.kind, "--remat", args.remat]
        return interleaved.Program(name, command, {"JAX_PLATFORMS": "cpu", "TRL_EXPERIMENTAL_SILENCE": "1"})

    programs = [start(name) for name in ("solar_jax", *args.peers.split(","))]
    rounds = interleaved.alternate(programs, args.warmup, args.repeats, args.patience)
    print(f"\n{args.kind}, medians of {args.repeats}, {os.cpu_count()} CPUs, remat {args.remat}")
    peaks = {}
    for p in programs:
        wall, cpu, others = (p.median(key, rounds) for key in ("wall", "cpu", "others"))
        peaks[p.name] = float(p.profile())
        print(
            f"{p.name:<12}{wall:8.2f} s  CPU {cpu:7.2f} s  peak {peaks[p.name]:5.2f} GiB  others {100 * others:.0f} %"
        )
    one, *peers = programs
    for p in peers:
        print(
            f"solar_jax takes {one.median('cpu', rounds) / p.median('cpu', rounds):.2f} of {p.name}'s CPU time and "
            f"{peaks[one.name] / peaks[p.name]:.2f} of its memory; first losses differ by "
            f"{abs(one.turns[0]['loss'] - p.turns[0]['loss']):.1e}"
        )
    for p in programs:
        p.close()
    if any(abs(one.turns[0]["loss"] - p.turns[0]["loss"]) > TOLERANCE for p in peers):
        raise SystemExit(f"error: the first losses differ by more than {TOLERANCE}.")
    return None


if __name__ == "__main__":
    main()
