"""The stages of a run, each a function of it; a recipe is a sequence of stages."""

import dataclasses
import functools
from collections.abc import Callable

import optax

from solar_jax.checkpoints.adapters import OWN, OwnAdapter, lows_of, replication_of, write_peft
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint, read_adapter
from solar_jax.checkpoints.upcycled import why_not_hf
from solar_jax.checkpoints.views import grown
from solar_jax.growth.operators import beside_map
from solar_jax.model.precision import precision
from solar_jax.orbax_store.layout import MODEL_FOLDER, newest
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.parallel import processes
from solar_jax.storage import bucket_folder
from solar_jax.storage.atomic_folder import new_folder
from solar_jax.storage.paths import is_local
from solar_jax.training.growing import Phase, grown_state, make_phases
from solar_jax.training.loop import train_arm
from solar_jax.training.partition import Partition
from solar_jax.training.run import Arm, Run, evaluate, first_params, say
from solar_jax.training.state import State, abstract_state, state_shardings
from solar_jax.training.tuning import tune_on_answers, tune_on_pairs

Stage = Callable[[Run], None]


def measure_base(run: Run) -> None:
    """Held-out loss of the base, which is also the control's before training."""
    if any(r["arm"] == "control" for r in run.evals.read()):
        return
    loss = evaluate(run, "base", 0, run.checkpoint.cfg, first_params(run, run.checkpoint))
    run.evals.append({"arm": "control", "step": 0, "loss": loss})
    run.evals.flush()
    say(f"base: held-out loss {loss:.4f}")


def heal(run: Run) -> None:
    """Trains the grown model; where it grows in the run, the base first, one phase after the other."""
    train, growth = run.config.train, run.config.growth
    phases = make_phases(run.checkpoint.cfg.num_hidden_layers, run.config)
    before: Arm | None = None
    for phase in phases:
        healed = phase is phases[-1]
        folder = run.workdir if healed else run.workdir / f"until_{phase.last}"
        arm = Arm(
            "healed" if healed else f"until_{phase.last}",
            run.grown if healed else grown(run.checkpoint, phase.total),
            folder,
            train.trainable if healed or train.trainable == "no_embed" else "all",
            run.config.lora,
            new_rate=growth.new_rate,
            first=phase.first,
            last=phase.last,
            begin=None if before is None else functools.partial(_grown_from, run, before, phase),
        )
        train_arm(run, arm)
        before = arm


def _grown_from(
    run: Run, before: Arm, phase: Phase, abstract: State, optimizer: optax.GradientTransformation, partition: Partition
) -> State:
    """Reads the last checkpoint of the phase before and grows it, so that a resumed run begins with the same bits."""
    weights, its = precision(run.config.train).weights, before.partition
    shardings = state_shardings(before.cfg, optimizer, run.mesh, its)
    wanted = abstract_state(before.cfg, weights, optimizer, shardings, its)
    with CheckpointStore(before.folder, run.config.checkpoint) as store:
        params, opt_state, host = store.restore(phase.first, wanted["params"], wanted["opt_state"])
    say(f"{before.name}: step {phase.first} done; growing by {phase.growth.operator}")
    state = {"params": params, "opt_state": opt_state}
    kind, post_norm = run.config.growth.state, run.checkpoint.cfg.post_norm
    return grown_state(state, abstract, phase, kind, post_norm, partition, optimizer) | {"host": host}


def tune(run: Run) -> None:
    """Trains the model on conversations or pairs."""
    assert run.end is not None
    if run.kind == "pairs":
        tune_on_pairs(run, run.corpus, run.end)
    else:
        tune_on_answers(run, run.end)


def export(run: Run) -> None:
    """Writes the trained model as an HF folder, `hf/`, and an adapter as `adapter/`."""
    hf, config = run.workdir / "hf", run.config
    # Locally the folder appears when it is complete; in a bucket config.json comes last.
    if not (hf.exists() if is_local(hf) else "config.json" in bucket_folder.names(hf)):
        target = Target(hf, dtype=config.export.dtype, max_shard_size=config.export.max_shard_size)
        c = open_checkpoint(str(run.workdir))
        if reason := why_not_hf(c):
            say(f"{run.arm}: not written as {hf.name}/: {reason}")
            return
        convert_checkpoint(c, target, "train", losses=_losses(run), steps=_last_step(run))
    say(f"{run.arm}: written to {hf}")
    if config.lora.rank:
        _export_adapter(run)


def _export_adapter(run: Run) -> None:
    """Writes a run's adapter as PEFT folders: `adapter/` of the model that was tuned, `adapter_of_base/` of its base.

    The second is written where growth made plain copies, which PEFT's layer_replication can repeat.
    """
    own = OwnAdapter.read(run.workdir / MODEL_FOLDER / OWN)
    step = newest(run.workdir)
    if not is_local(run.workdir) or not processes.is_first() or step is None:
        return
    lows = lows_of(read_adapter(step, own.lora), own.lora, own.layers)
    layer_map = run.grown.layer_map
    places: dict[str, tuple[str, list[list[int]] | None]] = {}
    if layer_map.is_identity or own.source != run.config.source:
        places["adapter"] = own.source, None
    elif layer_map.copies_only:
        places["adapter_of_base"] = own.source, replication_of(layer_map)
    for name, (base, replication) in places.items():
        out = run.workdir / name
        if not out.exists():
            with new_folder(out) as folder:
                write_peft(folder, lows, own.lora, own.layers, base, replication)
        say(f"{run.arm}: adapter written to {out}, of {base}{' with repeated layers' if replication else ''}")


def _losses(run: Run) -> dict[str, float]:
    """Returns the held-out losses for the model card."""
    last = _last_step(run)
    found = {(r["arm"], r["step"]): r["loss"] for r in run.evals.read()}
    before = "grown, not trained" if run.kind == "text" else "before tuning"
    first = max(run.config.growth.steps, default=0)  # the last growth, where the arm begins
    names = {("base", 0): "base", (run.arm, first): before, (run.arm, last): f"this model, {last} steps"}
    return {name: found[key] for key, name in names.items() if key in found}


def train_beside(run: Run) -> None:
    """Grows another cut and trains it on the same tokens, where the config asks for it."""
    config = run.config
    if cut := beside_map(config.growth, run.checkpoint.cfg.num_hidden_layers):
        arm = Arm("beside", grown(run.checkpoint, cut), run.workdir / "beside", config.train.trainable, config.lora)
        train_arm(run, dataclasses.replace(arm, new_rate=config.growth.new_rate))


def train_control(run: Run) -> None:
    """Trains the base without growth on the same tokens, where the config asks for it."""
    if run.config.train.control:
        # A base has no new layers and no seam, so the control of a run that trains those trains all layers.
        trainable = run.config.train.trainable if run.config.train.trainable == "no_embed" else "all"
        train_arm(run, Arm("control", run.checkpoint, run.workdir / "control", trainable))


def _last_step(run: Run) -> int:
    return max(r["step"] for r in run.evals.read() if r["arm"] == run.arm)


CONTINUED_PRETRAINING: tuple[Stage, ...] = (measure_base, heal, export, train_beside, train_control)
TUNING: tuple[Stage, ...] = (tune, export)
RECIPES = {"text": CONTINUED_PRETRAINING, "conversations": TUNING, "pairs": TUNING}  # by kind of record
