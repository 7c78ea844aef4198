"""lm-eval's tasks measured on parameters that live on a mesh, such as those of a model in training."""

from collections.abc import Callable
from typing import Any

import jax
import lm_eval
from jax.sharding import Mesh

from solar_jax.checkpoints.checkpoint import Checkpoint, numpy_dtype
from solar_jax.checkpoints.tokenizer import end_ids, load_tokenizer
from solar_jax.config import EvaluationConfig, ModelConfig
from solar_jax.decoding.model import Loaded, decoding_mesh, load_model
from solar_jax.evaluation.h6 import h6_scores
from solar_jax.evaluation.harness import SolarModel
from solar_jax.evaluation.scoring import Scorer
from solar_jax.evaluation.tasks import Suite, find_tasks, quiet_lm_eval
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules

Scores = dict[str, float]  # "h6", or TASK/METRIC -> percent for H6 and its tasks, lm-eval's value for others


def find_suite(cfg: EvaluationConfig) -> Suite:
    """Finds the tasks of a config, which reads their data.

    Raises:
      UserError: an unknown task, or bad data.
    """
    quiet_lm_eval()
    names = [name for entry in cfg.tasks for name in entry.split(",")]
    return find_tasks(names, cfg.task_path or None, cfg.task_data or None)


class LiveTasks:
    """Tasks that are measured again and again, by programs that are compiled once."""

    def __init__(
        self, suite: Suite, limit: int, c: Checkpoint, cfg: ModelConfig, mesh: Mesh, *, dtype: str,
        prepare: Callable[[Params], Params] = lambda params: params,
        whole: Callable[[Params], Params] = lambda params: params,
    ):  # fmt: skip
        """Prepares a model of a shape.

        Args:
          suite: the tasks.
          limit: items of each; 0: all.
          c: the checkpoint with its tokenizer.
          cfg: the architecture.
          mesh: of the parameters.
          dtype: of matmuls and activations.
          prepare: makes of the parameters what `model.llama.hidden` takes.
          whole: makes of them the stacked state, which tasks with generated answers need.
        """
        self._suite, self._limit, self._whole = suite, limit, whole
        split = decoding_mesh(cfg, mesh.devices.flatten().tolist())
        loaded = Loaded(cfg, {}, dtype, load_tokenizer(c), end_ids(c), c.companions, c.where, split)
        self._shardings = rules.parameter_shardings(cfg, split)
        scorer = Scorer(cfg, {}, mesh=mesh, compute_dtype=numpy_dtype(dtype), prepare=prepare)
        bos = False if suite.preset == "h6_2023" else None
        self._model = SolarModel(loaded, scorer=scorer, add_bos_token=bos, quiet=True)

    def of(self, params: Params) -> Scores:
        """Measures parameters; nothing is kept of them."""
        self._model.use(params, lambda: jax.device_put(self._whole(params), self._shardings))
        try:
            found: Any = lm_eval.simple_evaluate(
                model=self._model, tasks=list(self._suite.tasks), task_manager=self._suite.manager,
                limit=self._limit or None, log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
        finally:
            self._model.use({}, dict)
        return _scores(found, self._suite)


def _scores(found: dict[str, Any], suite: Suite) -> Scores:
    scores: Scores = {}
    of_h6: set[str] = set()
    if suite.preset:
        h6 = h6_scores(found["results"], suite.subjects, found["n-samples"])
        scores["h6"] = h6["mean"]
        of_h6 = set(h6["items"]) | set(suite.subjects)
        scores |= {f"h6/{name}": h6[name] for name in h6["items"]}
    for task, result in found["results"].items():
        if task not in of_h6:
            values = {key: value for key, value in result.items() if "," in key and "_stderr" not in key}
            scores |= {
                f"{task}/{key.split(',')[0]}": float(v) for key, v in values.items() if isinstance(v, int | float)
            }
    return scores


def scores_of(c: Checkpoint, suite: Suite, limit: int) -> Scores:
    """Measures a checkpoint, in its own dtype, on all devices."""
    loaded = load_model(c, c.dtype)
    assert loaded.mesh is not None
    return LiveTasks(suite, limit, c, c.cfg, loaded.mesh, dtype=c.dtype).of(loaded.params)


def score_line(scores: Scores) -> str:
    """Formats scores, H6 alone where it was measured."""
    if "h6" in scores:
        parts = ", ".join(f"{name.removeprefix('h6/')} {v:.1f}" for name, v in scores.items() if name.startswith("h6/"))
        return f"H6 {scores['h6']:.2f} ({parts})"
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
