"""Measure a model on lm-eval's tasks, in this process and on its mesh, without exporting it.

    python -m solar_jax.evaluate --model SRC --tasks NAME,... [--include_path DIR] [--limit N] --out FILE.json

Tasks, prompts and metrics are lm-eval's; the model is ours, and computes what sequences have in common once. The same
command resumes after a kill: what is known is kept beside FILE, by the checkpoint's hash. Needs the extra `eval`.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import DTYPES
from solar_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("model", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_list("tasks", [], "lm-eval's names of tasks and groups.")
    flags.DEFINE_string("include_path", None, "Folder of tasks in lm-eval's layout; its own are then not looked up.")
    flags.DEFINE_integer("num_fewshot", None, "Examples before each question; as the task says if not given.")
    flags.DEFINE_integer("limit", None, "Only the first so many items of each task.")
    flags.DEFINE_string("out", None, "JSON file of results.")
    flags.DEFINE_bool("log_samples", True, "Keep every item's prompts and answers in FILE.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of weights and activations.")
    flags.DEFINE_integer("max_length", None, "Most tokens of a context with its answer; the model's own if not given.")
    flags.DEFINE_enum("add_bos_token", "auto", ("auto", "true", "false"), "BOS before texts; auto: as its tokenizer.")
    flags.DEFINE_bool("apply_chat_template", False, "Write prompts by the model's chat template.")
    flags.DEFINE_integer("rows", 8, "Answers that are generated side by side.")
    flags.DEFINE_bool("check_bos", True, "Stop if BOS is set so that the model reads text clearly worse.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.model or not f.tasks or not f.out:
        raise UserError("evaluate needs --model SRC, --tasks NAME,... and --out FILE.json.")
    if f.include_path and not pathlib.Path(f.include_path).is_dir():
        raise UserError(f"--include_path={f.include_path}: no such folder.")
    if f.limit is not None and f.limit < 1:
        raise UserError(f"--limit must be at least 1, found {f.limit}.")
    check_local(f.model)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.model import load_model
from solar_jax.parallel import processes
from solar_jax.storage.json_files import write_json


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    how = {
        "limit": f.limit, "num_fewshot": f.num_fewshot, "dtype": f.dtype, "max_length": f.max_length,
        "add_bos_token": {"true": True, "false": False}.get(f.add_bos_token), "chat": f.apply_chat_template,
        "rows": f.rows, "check_bos": f.check_bos,
    }  # fmt: skip
    evaluate_tasks(f.model, f.tasks, pathlib.Path(f.out), f.include_path, log_samples=f.log_samples, **how)


def evaluate_tasks(
    source: str, tasks: Sequence[str], out: pathlib.Path, include_path: str | None = None, *, limit: int | None = None,
    num_fewshot: int | None = None, dtype: str = "float32", max_length: int | None = None,
    add_bos_token: bool | None = None, chat: bool = False, rows: int = 8, check_bos: bool = True,
    log_samples: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a model and writes the results.

    Args:
      source: SRC.
      tasks: lm-eval's names.
      out: the JSON file: `results`, `n-shot`, `samples` by task, versions, tokens asked and computed.
      include_path: folder of tasks, in place of lm-eval's own.
      limit: items of each task; all if None.
      num_fewshot: examples; as each task says if None.
      dtype, max_length, add_bos_token, rows: as in `SolarModel`.
      chat: write prompts by the chat template.
      check_bos: stop where BOS is set to the model's disadvantage.
      log_samples: keep every item.

    Returns:
      The content of `out`.

    Raises:
      UserError: no such task, or a setting that the model reads clearly worse with.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as e:
        raise UserError(f"evaluate needs lm-eval ({e}); it comes with the extra `eval`.") from e
    from solar_jax.evaluation.bos import check_bos_setting  # imported here: they need lm-eval
    from solar_jax.evaluation.harness import SolarModel

    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        where = f"in {include_path}" if include_path else "among lm-eval's"
        raise UserError(f"--tasks: {unknown[0]!r} is not {where} ({len(manager.all_tasks):,} tasks).")
    c = open_checkpoint(source)
    model = SolarModel(
        load_model(c, dtype), max_length=max_length, add_bos_token=add_bos_token, rows=rows
    )  # fmt: skip
    bos = check_bos_setting(model, stops=check_bos)
    print(bos.line(), flush=True)
    key = hashlib.sha256(
        json.dumps([lineage.fingerprint(c), dtype, max_length, add_bos_token], sort_keys=True).encode()
    )
    store = out.with_name(f".{out.name}.{key.hexdigest()[:16]}")
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot,
        use_cache=str(store), log_samples=log_samples, apply_chat_template=chat, bootstrap_iters=1000,
    )  # fmt: skip
    assert found is not None
    counts = model.scorer.counts
    content = {
        "model": lineage.public(c.where),
        "results": found["results"],
        "groups": found.get("groups", {}),
        "n-shot": found["n-shot"],
        "higher_is_better": found.get("higher_is_better", {}),
        "bos": bos.record(),
        "tokens": {"asked": counts.asked, "computed": counts.computed, "padding": counts.padding},
        "lm_eval": lm_eval.__version__,
        "limit": limit,
    } | ({"samples": found["samples"]} if log_samples else {})
    write_json(out, json.loads(json.dumps(content, default=str)))
    for file in out.parent.glob(f"{store.name}*"):
        file.unlink()
    print(make_table(found), flush=True)
    saved = 100 * (1 - counts.computed / counts.asked) if counts.asked else 0
    print(f"{counts.asked:,} tokens asked, {counts.computed:,} computed, {saved:.0f} % saved by common beginnings")
    print(f"{out}: written")
    return content


if __name__ == "__main__":
    command.start(main)
