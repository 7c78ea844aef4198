"""The stages of a run, each a function of it; a recipe is a sequence of stages."""

from collections.abc import Callable

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.storage import bucket_folder
from solar_jax.storage.paths import is_local
from solar_jax.training.loop import train_arm
from solar_jax.training.run import Arm, Run, evaluate, first_params, say

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
    """Trains the grown model."""
    train_arm(run, Arm("healed", run.grown, run.workdir, run.config.train.trainable))


def export(run: Run) -> None:
    """Writes the healed model as an HF folder, `hf/`."""
    hf, config = run.workdir / "hf", run.config
    # Locally the folder appears when it is complete; in a bucket config.json comes last.
    if not (hf.exists() if is_local(hf) else "config.json" in bucket_folder.names(hf)):
        target = Target(hf, dtype=config.export.dtype, max_shard_size=config.export.max_shard_size)
        c = open_checkpoint(str(run.workdir))
        convert_checkpoint(c, target, "train", losses=_losses(run), steps=config.train.steps)
    say(f"healed: written to {hf}")


def _losses(run: Run) -> dict[str, float]:
    """Returns the held-out losses for the model card."""
    last = run.config.train.steps
    found = {(r["arm"], r["step"]): r["loss"] for r in run.evals.read()}
    names = {("base", 0): "base", ("healed", 0): "grown, not trained", ("healed", last): f"this model, {last} steps"}
    return {name: found[key] for key, name in names.items() if key in found}


def train_control(run: Run) -> None:
    """Trains the base without growth on the same tokens, where the config asks for it."""
    if run.config.train.control:
        # A base has no new layers and no seam, so the control of a run that trains those trains all layers.
        trainable = run.config.train.trainable if run.config.train.trainable == "no_embed" else "all"
        train_arm(run, Arm("control", run.checkpoint, run.workdir / "control", trainable))


CONTINUED_PRETRAINING: tuple[Stage, ...] = (measure_base, heal, export, train_control)
