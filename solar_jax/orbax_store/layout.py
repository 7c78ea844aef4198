"""Where a run's checkpoints are, found without Orbax."""

import pathlib

COMMITTED = "commit_success.txt"  # Orbax writes it last
FOLDER = "checkpoints"
MODEL_FOLDER = "model"


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of a run's newest whole checkpoint, found without Orbax, which asks every process."""
    folder = workdir / FOLDER
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / COMMITTED).exists()]
    return folder / str(max(steps)) if steps else None
