"""Measure a model on lm-eval's tasks, in this process and on its mesh, without exporting it.

    python -m solar_jax.evaluate --model SRC --tasks h6|NAME,... [--data DIR] [--include_path DIR] --out FILE.json

Tasks, prompts and metrics are lm-eval's; the model is ours, and computes what sequences have in common once. `h6` is
the six benchmarks of the paper with its shots; `h6_2023` also what differed in the harness by which the paper measured.
The same command resumes after a kill: what is known is kept beside FILE, by the checkpoint's hash. Needs the extra
`eval`.
"""

import datetime
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import DTYPES
from solar_jax.errors import UserError
from solar_jax.evaluation.h6 import PRESETS, h6_scores, h6_table, presets_in


def define_flags() -> None:
    flags.DEFINE_string("model", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_list("tasks", [], "h6, h6_2023, and lm-eval's names of tasks and groups.")
    flags.DEFINE_string("include_path", None, "Folder of tasks in lm-eval's layout, which come before its own.")
    flags.DEFINE_string("data", None, "Folder of the benchmarks' files, read in place of the hub's data sets.")
    flags.DEFINE_integer("num_fewshot", None, "Examples before each question; as the task says if not given.")
    flags.DEFINE_integer("limit", None, "Only the first so many items of each task.")
    flags.DEFINE_string("out", None, "JSON file of results.")
    flags.DEFINE_bool("log_samples", True, "Keep every item's prompts and answers in FILE.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of weights and activations; the model's own if not given.")
    flags.DEFINE_integer("max_length", None, "Most tokens of a context with its answer; the model's own if not given.")
    flags.DEFINE_enum("add_bos_token", "auto", ("auto", "true", "false"), "BOS before texts; auto: as its tokenizer.")
    flags.DEFINE_bool("apply_chat_template", False, "Write prompts by the model's chat template.")
    flags.DEFINE_integer("rows", 8, "Answers that are generated side by side.")
    flags.DEFINE_bool("compilation_cache", True, "Reuse compiled programs at the next start.")
    flags.DEFINE_bool("check_bos", True, "Stop if BOS is set so that the model reads text clearly worse.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.model or not f.tasks or not f.out:
        raise UserError("evaluate needs --model SRC, --tasks NAME,... and --out FILE.json.")
    for name, folder in (("include_path", f.include_path), ("data", f.data)):
        if folder and not pathlib.Path(folder).is_dir():
            raise UserError(f"--{name}={folder}: no such folder.")
    if preset := presets_in(f.tasks):
        if f.num_fewshot is not None:
            raise UserError(f"--num_fewshot: {preset} sets the shots of its tasks; name the tasks themselves.")
        if f.apply_chat_template:
            raise UserError(f"--apply_chat_template: {preset} is measured without; name the tasks themselves.")
    if f.limit is not None and f.limit < 1:
        raise UserError(f"--limit must be at least 1, found {f.limit}.")
    check_local(f.model)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.model import load_model
from solar_jax.evaluation.report import write_report
from solar_jax.evaluation.store import Store
from solar_jax.hardware import compilation
from solar_jax.parallel import processes
from solar_jax.storage.json_files import write_json
from solar_jax.storage.paths import is_local


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    compilation.use_cache(f.compilation_cache)
    how = {
        "data": f.data, "limit": f.limit, "num_fewshot": f.num_fewshot, "dtype": f.dtype, "max_length": f.max_length,
        "add_bos_token": {"true": True, "false": False}.get(f.add_bos_token), "chat": f.apply_chat_template,
        "rows": f.rows, "check_bos": f.check_bos,
    }  # fmt: skip
    evaluate_tasks(f.model, f.tasks, pathlib.Path(f.out), f.include_path, log_samples=f.log_samples, **how)


def evaluate_tasks(
    source: str, tasks: Sequence[str], out: pathlib.Path, include_path: str | None = None, *, data: str | None = None,
    limit: int | None = None, num_fewshot: int | None = None, dtype: str | None = None, max_length: int | None = None,
    add_bos_token: bool | None = None, chat: bool = False, rows: int = 8, check_bos: bool = True,
    log_samples: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a model and writes the results.

    Args:
      source: SRC.
      tasks: lm-eval's names, or a preset.
      out: the JSON file: `results`, `n-shot`, `h6`, `samples` by task, versions, tokens asked and computed.
      include_path: folder of tasks, which come before lm-eval's own.
      data: folder of the benchmarks' files, in place of the hub.
      limit: items of each task; all if None.
      num_fewshot: examples; as each task says if None.
      dtype: of weights and activations; the checkpoint's if None.
      max_length, add_bos_token, rows: as in `SolarModel`; h6_2023 has no BOS unless it is asked for.
      chat: write prompts by the chat template.
      check_bos: stop where BOS is set to the model's disadvantage.
      log_samples: keep every item.

    Returns:
      The content of `out`.

    Raises:
      UserError: no such task, bad data, or a setting that the model reads clearly worse with.
    """
    try:
        import lm_eval
        from lm_eval.utils import make_table
    except ImportError as e:
        raise UserError(f"evaluate needs lm-eval ({e}); it comes with the extra `eval`.") from e
    from solar_jax.evaluation.bos import check_bos_setting  # imported here: they need lm-eval
    from solar_jax.evaluation.harness import SolarModel
    from solar_jax.evaluation.tasks import find_tasks, quiet_lm_eval

    quiet_lm_eval()
    suite = find_tasks(tasks, include_path, data)
    c = open_checkpoint(source)
    dtype = dtype or c.dtype
    if suite.preset == "h6_2023" and add_bos_token is None:
        add_bos_token = False
    settings = [lineage.fingerprint(c), dtype, max_length, add_bos_token]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    place = out.with_name(f".{out.name}.{key}")
    if is_local(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    store = Store(place)
    _say(f"{lineage.public(c.where)} in {dtype}: {', '.join(tasks)}; {len(store)} answers are known from before")
    for line in PRESETS.get(suite.preset or "", ()):
        _say(f"{suite.preset} differs from h6: {line}")
    model = SolarModel(
        load_model(c, dtype), max_length=max_length, add_bos_token=add_bos_token, rows=rows, store=store,
        quiet=not processes.is_first(),
    )  # fmt: skip
    bos = check_bos_setting(model, stops=check_bos)
    _say(bos.line())
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(suite.tasks), task_manager=suite.manager, limit=limit, num_fewshot=num_fewshot,
        log_samples=log_samples, apply_chat_template=chat, bootstrap_iters=1000,
    )  # fmt: skip
    assert found is not None
    counts = model.scorer.counts
    content = {
        "model": lineage.public(c.where),
        "dtype": dtype,
        "preset": suite.preset,
        "differences": list(PRESETS.get(suite.preset or "", ())),
        "results": found["results"],
        "groups": found.get("groups", {}),
        "n-shot": found["n-shot"],
        "n-samples": found["n-samples"],
        "higher_is_better": found.get("higher_is_better", {}),
        "bos": bos.record(),
        "chat_template": chat,
        "tokens": {"asked": counts.asked, "computed": counts.computed, "padding": counts.padding},
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if suite.preset:
        content["h6"] = h6_scores(found["results"], suite.subjects, found["n-samples"])
    if log_samples:
        content["samples"] = found["samples"]
    content = json.loads(json.dumps(content, default=str))
    if processes.is_first():
        write_json(out, content)
        place.unlink(missing_ok=True)
        _report(content, out)
    _say(make_table(found))
    if suite.preset:
        _say(h6_table(content["h6"]))
    saved = 100 * (1 - counts.computed / counts.asked) if counts.asked else 0
    _say(f"{counts.asked:,} tokens asked, {counts.computed:,} computed, {saved:.0f} % saved by common beginnings")
    _say(f"{out}: written")
    return content


def _report(content: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the report of a preset beside its results, if its scores are numbers."""
    if content["preset"] is None or not is_local(out):
        return
    bad = [task for task in content["h6"]["items"] if not math.isfinite(content["h6"][task])]
    if bad:
        _say(f"no report: the score of {bad[0]} is not a number; its probabilities are below what lm-eval can add up.")
        return
    for file in write_report([out], out.parent, out.stem):
        _say(f"{file}: written")


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


if __name__ == "__main__":
    command.start(main)
