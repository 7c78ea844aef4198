"""Grow a checkpoint, heal it by continued pretraining, and write it out as a Hugging Face folder.

    python -m solar_jax.train --config configs/dus_48l.py:smollm2 [--config.train.steps=40] [--workdir DIR]

The same command again goes on from the last good checkpoint; SIGTERM, or the notice of a preemption, saves the step
that is being taken and ends the command with status 75. --allow_changed=train.steps,data goes on with a run of which
these have changed. Left in DIR: config.json, data.json, metrics.jsonl (one line a step), evals.jsonl, summary.json,
loss.png, checkpoints/, hf/, model/, and control/ where a control was asked for.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.cli.command import folder_from_flag
from solar_jax.config import Config, ModelConfig, resolve
from solar_jax.data.sources import check_sources
from solar_jax.errors import UserError
from solar_jax.monitoring.profiling import listen_for_profiles
from solar_jax.training.preemption import listen_for_preemption


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARGUMENT].")
    flags.DEFINE_string(
        "workdir", None, "Folder of the run, here or gs://BUCKET/FOLDER; runs/<config name> if not given."
    )
    flags.DEFINE_list(
        "allow_changed",
        [],
        "What a run may go on with though it is not as before: config keys or groups, tokenizer, data.",
    )


def check() -> None:
    """Raises a UserError for flags that cannot work; imports no jax."""
    f = flags.FLAGS
    if f.config is None:
        raise UserError("--config is missing; for a first run give --config=configs/dus_48l.py:smollm2.")
    config = resolve(f.config)
    folder_from_flag(f.workdir or f"runs/{config.name}")
    check_local(config.source)
    check_sources(config.data)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the imports that take seconds

import jax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.hf_config import differences
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.checkpoints.views import grown
from solar_jax.checkpoints.write_hf import parse_size
from solar_jax.cli.plots import plot_losses
from solar_jax.cli.progress import duration
from solar_jax.data.corpus import Corpus, heldout_rows, load_corpus
from solar_jax.data.pipeline import batch_documents, heldout_batches, passes, training_rows
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.growth.picture import layer_list, picture
from solar_jax.hardware import chips, compilation
from solar_jax.hardware.chips import memory_peaks
from solar_jax.model.flops import flops_per_token
from solar_jax.model.precision import compute_dtype
from solar_jax.model.shapes import parameter_count
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import Ledger, goodput_line
from solar_jax.monitoring.trackers import Writers, check_packages
from solar_jax.parallel import processes, rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning import search
from solar_jax.planning.memory import GIB, Need
from solar_jax.storage import bucket_folder
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.storage.paths import is_local
from solar_jax.training import run_folder
from solar_jax.training.loop import train
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.partition import Partition, make_partition
from solar_jax.training.run import Arm, Run, evaluate, first_params, say


def main(argv: Sequence[str]) -> None:
    del argv
    config = resolve(flags.FLAGS.config)
    processes.join()
    with listen_for_profiles(), listen_for_preemption():
        run(config, folder_from_flag(flags.FLAGS.workdir or f"runs/{config.name}"), flags.FLAGS.allow_changed)


def run(config: Config, folder: pathlib.Path, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """The whole run, from the checkpoint to the healed model's HF folder.

    Args:
      config: of the run.
      folder: where it is kept, and found again.
      allowed: what may have changed since it began: keys of the config or groups of them, "tokenizer", "data".

    Returns:
      The content of summary.json.

    Raises:
      UserError: something that the config names is missing, damaged or does not fit; nothing is left behind.
    """
    begin, started = time.perf_counter(), time.time()
    compilation.use_cache(config.logging.compilation_cache)
    # ---- What is asked for: every refusal comes here, before anything is allocated or written -------------------
    check_names(config)
    run_folder.check_allowed(allowed)
    run_folder.check_place(folder)
    devices = search.present()
    if config.model.num_hidden_layers:  # the shape is known, so what cannot fit is told without a checkpoint
        layer_map = make_layer_map(config.model.num_hidden_layers, config.growth)
        search.choose(
            grown_config(config.model, layer_map), config, devices, make_partition(config.train.trainable, layer_map)
        )
    checkpoint = open_checkpoint(config.source)
    check_model(config, checkpoint)
    layer_map = make_layer_map(checkpoint.cfg.num_hidden_layers, config.growth)
    partition = make_partition(config.train.trainable, layer_map)
    deeper = grown(checkpoint, layer_map)
    option, need = search.choose(deeper.cfg, config, devices, partition)
    mesh = make_mesh(option.config.mesh)
    tokenizer, eos = load_tokenizer(checkpoint), eos_id(checkpoint)
    goes_on = run_folder.check_owner(folder, config, allowed)
    if summary := read_json(folder / "summary.json"):
        say(f"{folder}: this run is complete.\n{result_table(summary)}")
        return summary
    corpus = load_corpus(config.data, tokenizer, eos)
    text = run_folder.text_record(checkpoint, corpus)
    if goes_on:
        run_folder.check_text(folder, text, allowed)
    passes(corpus, config.train.steps * config.train.batch_size)  # refused where a source may not be read so often

    # ---- What will be done ----------------------------------------------------------------------------------------
    heldout = heldout_rows(corpus, config.evaluation.windows)
    announce(config, folder, deeper, partition, option, need, corpus, len(heldout), goes_on)
    processes.wait("everything is checked")
    if processes.is_first():
        if goes_on:
            run_folder.update(folder, config, text)
        else:
            run_folder.create(folder, config, deeper, text)
    processes.wait("the run's folder is there")
    ledger = Ledger(folder, started)
    local = folder if is_local(folder) else pathlib.Path("runs") / config.name
    shared = Run(
        config=option.config,
        workdir=folder,
        local_folder=local,
        checkpoint=checkpoint,
        mesh=mesh,
        rows=training_rows(corpus, config.seed),
        heldout=heldout_batches(
            heldout, rules.padded_rows(config.evaluation.batch_size, mesh), rules.batch_sharding(mesh)
        ),
        evals=metrics.JsonLines(folder / "evals.jsonl"),
        ledger=ledger,
        documents=functools.partial(batch_documents, corpus, config.seed),
        writers=Writers(config.logging, local, config.name, ledger.first_start, run_folder.config_dict(config)),
    )

    # ---- The base as it is, the grown model, and the control ------------------------------------------------------
    with contextlib.closing(shared.writers):
        train_arms(shared, deeper)

    shared.ledger.write()
    processes.wait("all arms are trained and recorded")  # since every process reads what the first has written

    # ---- What came of it --------------------------------------------------------------------------------------------
    summary = summarise(shared, deeper, time.perf_counter() - begin)
    if processes.is_first():
        draw(shared, summary)
        write_json(folder / "summary.json", summary)
    processes.wait("the summary is written")
    say(f"\n{result_table(summary)}\n{goodput_line(summary['time'])}")
    say(f"{folder}: summary.json, metrics.jsonl, loss.png, checkpoints/, hf/")
    return summary


def train_arms(shared: Run, deeper: Checkpoint) -> None:
    """Measures the base, heals the grown model and exports it, and trains the control where one is asked for."""
    config, checkpoint, folder = shared.config, shared.checkpoint, shared.workdir
    if not any(r["arm"] == "control" for r in shared.evals.read()):
        loss = evaluate(shared, "base", 0, checkpoint.cfg, first_params(shared, checkpoint))
        shared.evals.append({"arm": "control", "step": 0, "loss": loss})  # before training the control is the base
        shared.evals.flush()
        say(f"base: held-out loss {loss:.4f}")
    healed = Arm("healed", deeper, folder, config.train.trainable)
    train(shared, healed)
    if not is_exported(folder / "hf"):
        export = Target(folder / "hf", dtype=config.export.dtype, max_shard_size=config.export.max_shard_size)
        convert_checkpoint(open_checkpoint(str(folder)), export, "train", steps=config.train.steps)
    say(f"healed: written to {folder / 'hf'}")
    if config.train.control:
        # A base has no new layers and no seam, so that a control of such a run trains them all.
        trainable = config.train.trainable if config.train.trainable == "no_embed" else "all"
        train(shared, Arm("control", checkpoint, folder / "control", trainable))


def is_exported(hf: pathlib.Path) -> bool:
    """Whether the healed model is there: here its folder appears when it is whole, in a bucket config.json does."""
    return hf.exists() if is_local(hf) else "config.json" in bucket_folder.names(hf)


def check_names(config: Config) -> None:
    """Raises a UserError for a name in the config that stands in none of the tables, or a package that is missing."""
    make_optimizer(config)
    parse_size(config.export.max_shard_size)
    check_packages(config.logging)


def check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Raises a UserError where the checkpoint is not what the config expects, or too short for its rows."""
    for key, (expected, found) in differences(config.model, checkpoint.cfg).items():
        raise UserError(f"{checkpoint.where}: config.model.{key} expects {expected}, found {found}.")
    longest = checkpoint.cfg.max_position_embeddings
    if config.data.sequence_length > longest:
        raise UserError(
            f"config.data.sequence_length={config.data.sequence_length} exceeds the model's "
            f"max_position_embeddings={longest}."
        )


def announce(
    config: Config, folder: pathlib.Path, deeper: Checkpoint, partition: Partition,
    option: search.Option, need: Need, corpus: Corpus, windows: int, goes_on: bool,
) -> None:  # fmt: skip
    """Says everything that is about to happen."""
    checkpoint, cfg = deeper.source, deeper.cfg
    base = checkpoint.cfg
    say("\n".join(f"{key} = {value!r}" for key, value in run_folder.flat(dataclasses.asdict(config)).items()))
    say(f"\n{'Going on with' if goes_on else 'Starting'} {config.name} in {folder}")
    say(f"base      {checkpoint.where}: {base.num_hidden_layers} layers, stored as {checkpoint.dtype}")
    say(f"growth    {picture(deeper.layer_map, parameter_count(base), parameter_count(cfg))}")
    say(f"trained   {config.train.trainable}: layers {layer_list([i for i, t in enumerate(partition.layers) if t])}")
    readings = passes(corpus, config.train.steps * config.train.batch_size)
    for (source, rows), times in zip(corpus.train, readings, strict=True):
        say(
            f"data      {source.path}: {rows.tokens:,} training tokens, {len(rows):,} rows, "
            f"weight {source.weight:g}, read {times:.2f} times"
        )
    for source, rows in corpus.heldout:
        say(f"held out  {source.path}: {rows.tokens:,} tokens")
    batch, length, steps = config.train.batch_size, config.data.sequence_length, config.train.steps
    say(
        f"training  {steps} steps of {batch} x {length} = {batch * length:,} tokens, {steps * batch * length:,} in all"
        f"{', and the control the same' if config.train.control else ''}; held-out loss on {windows} rows"
    )
    padded = rules.padded_rows(batch, option.mesh, option.config.train.accumulation)
    if padded > batch:
        say(f"padding   {batch} rows a step do not divide over the mesh: {padded - batch} empty rows are added")
    kind = jax.devices()[0].device_kind
    say(f"devices   {jax.device_count()} x {kind}, {jax.process_count()} process(es)")
    say(f"chosen    {option}" if search.is_open(config) else f"mesh      {option}")
    say(f"memory    about {need}; a device here has {chips.memory_bytes(jax.local_devices()[0]) / GIB:.1f} GiB")
    seconds = expected_seconds(config, base, cfg, windows)
    say(f"time      about {duration(seconds)}; each step will show what is left\n")


def expected_seconds(config: Config, base: ModelConfig, cfg: ModelConfig, windows: int) -> float:
    """A first guess: the run's model FLOPs at half of what one matmul reaches here, or at 40 % of the chip's peak."""
    length = config.data.sequence_length
    train_tokens = config.train.steps * config.train.batch_size * length
    per_arm = 2 + (config.train.steps // config.evaluation.every - 1 if config.evaluation.every else 0)
    flops = 0.0
    for arm, trains in ((base, config.train.control), (cfg, True)):
        evals = per_arm if trains else 1
        flops += flops_per_token(arm, length) * (train_tokens * trains + evals * windows * length / 3)
    peak = chips.peak_flops(jax.devices()[0])
    rate = 0.4 * peak * jax.device_count() if peak else 0.5 * chips.measured_flops(compute_dtype(config.train))
    return flops / rate


def summarise(run: Run, deeper: Checkpoint, seconds: float) -> dict[str, Any]:
    """The content of summary.json; losses are held-out means in nats a token."""
    config, base, layer_map, cfg = run.config, run.checkpoint.cfg, deeper.layer_map, deeper.cfg
    loss = {(r["arm"], r["step"]): r["loss"] for r in run.evals.read()}
    lines = metrics.JsonLines(run.workdir / "metrics.jsonl").read()
    control = metrics.JsonLines(run.workdir / "control" / "metrics.jsonl").read()
    rates = sorted(r["tokens_per_second"] for r in lines)
    used = [r["mfu"] for r in lines if r["mfu"] is not None]
    return {
        "name": config.name,
        "base_loss": loss["base", 0],
        "zero_token_loss": loss["healed", 0],
        "final_loss": loss["healed", config.train.steps],
        "control_loss": loss.get(("control", config.train.steps)),
        "layers": cfg.num_hidden_layers,
        "params": parameter_count(cfg),
        "tokens": lines[-1]["tokens"],
        "source_layers": list(layer_map.source),
        "operator": layer_map.operator,
        "base_layers": base.num_hidden_layers,
        "base_params": parameter_count(base),
        "steps": config.train.steps,
        "heldout_targets": int(sum(float(b["weights"].sum()) for b in run.heldout)),
        "tokens_per_second": rates[len(rates) // 2],
        "mfu": sorted(used)[len(used) // 2] if used else None,
        "seconds": round(seconds, 1),
        "time": run.ledger.summary(lines + control),
        "memory_peak_gib": memory_peaks(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(run.mesh.shape),
        "source": run.checkpoint.where,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }


def draw(run: Run, summary: dict[str, Any]) -> None:
    """loss.png: the healing curve against the base's line and the control's."""
    arms = {}
    for name, folder in (("healed", run.workdir), ("control", run.workdir / "control")):
        heldout = [(r["step"], r["loss"]) for r in run.evals.read() if r["arm"] == name]
        if lines := metrics.JsonLines(folder / "metrics.jsonl").read():
            arms[name] = {"heldout": heldout, "train": [(r["step"], r["loss"]) for r in lines if r["loss"] is not None]}
    title = (
        f"{summary['operator']}: {summary['base_layers']} to {summary['layers']} layers, {summary['tokens']:,} tokens"
    )
    plot_losses(run.workdir / "loss.png", title, summary["base_loss"], arms)


def result_table(s: dict[str, Any]) -> str:
    """The result in four lines."""
    rows = [
        ("base", s["base_layers"], s["base_params"], 0, s["base_loss"]),
        (f"grown, {s['operator']}", s["layers"], s["params"], 0, s["zero_token_loss"]),
        ("healed", s["layers"], s["params"], s["tokens"], s["final_loss"]),
    ]
    if s["control_loss"] is not None:
        rows.append(("control, not grown", s["base_layers"], s["base_params"], s["tokens"], s["control_loss"]))
    lines = [f"{'model':<24}{'layers':>7}{'parameters':>16}{'tokens':>14}{'held-out loss':>15}"]
    lines += [
        f"{name:<24}{layers:>7}{params:>16,}{tokens:>14,}{loss:>15.4f}" for name, layers, params, tokens, loss in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    command.start(main)
