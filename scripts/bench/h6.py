"""Times H6 next to lm-eval's Hugging Face class, whole processes in turns, and compares every item.

    uv run --extra demo --extra test python scripts/bench/h6.py --data DIR [--items 20] [--repeats 3]

DIR holds the benchmarks' files (see docs/evaluating.md). The first `--items` items of each task and subject are taken,
and `--written` of GSM8K, of at most 64 tokens; a model is SmolLM2 in float32 (`--model` for another folder). Both
programs start, compile and read the same folder; the other side runs at each of `--batches`, the fastest counts.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

MOST_NEW = 64  # tokens of an answer
SAME, TIED = 1e-3, 2e-3


def theirs(folder: str, data: str, tasks: str, batch: int, out: str) -> None:
    """The other side's process."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    from solar_jax.evaluation.tasks import find_tasks, quiet_lm_eval

    torch.set_num_threads(2)
    quiet_lm_eval()
    suite = find_tasks(["h6"], tasks, data)
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch)
    found = lm_eval.simple_evaluate(model=model, tasks=list(suite.tasks), bootstrap_iters=1000)
    assert found is not None
    pathlib.Path(out).write_text(json.dumps({k: found[k] for k in ("results", "samples")}, default=str))


def cut(data: pathlib.Path, to: pathlib.Path, items: int, written: int) -> None:
    """Copies the benchmarks' files with so many items of what is asked."""
    shutil.copytree(data, to)
    for file in to.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    lines = {
        "arc/ARC-Challenge-Test.jsonl": items, "hellaswag/hellaswag_val.jsonl": items, "winogrande/dev.jsonl": items,
        "gsm8k/test.jsonl": written,
    }  # fmt: skip
    for name, count in lines.items():
        (to / name).write_text("".join((data / name).read_text().splitlines(keepends=True)[:count]))
    questions = json.loads((data / "truthfulqa/mc_task.json").read_text())
    (to / "truthfulqa/mc_task.json").write_text(json.dumps(questions[:items]))
    import csv

    for file in (data / "mmlu/test").iterdir():
        with file.open(newline="") as source, (to / "mmlu/test" / file.name).open("w", newline="") as target:
            csv.writer(target).writerows(list(csv.reader(source))[:items])


def short_answers(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Writes a GSM8K task with short answers, which stands before lm-eval's."""
    import importlib.util

    spec = importlib.util.find_spec("lm_eval.tasks")
    assert spec is not None
    assert spec.origin is not None
    (folder / "gsm8k").mkdir(parents=True)
    (folder / "gsm8k/gsm8k.yaml").write_text(
        f"include: {pathlib.Path(spec.origin).parent}/gsm8k/gsm8k.yaml\n"
        "custom_dataset: !function solar_jax.evaluation.local_data.dataset\n"
        f"dataset_kwargs: {{folder: {data}, task: gsm8k}}\n"
        f"generation_kwargs: {{until: ['Question:', '</s>', '<|im_end|>'], do_sample: false, "
        f"temperature: 0.0, max_gen_toks: {MOST_NEW}}}\n"
    )


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Compares every item: prompts, log-likelihoods, greedy flags, texts and scores."""
    worst, values, different, ties = 0.0, 0, [], []
    for task, theirs in b["samples"].items():
        ours = {(item["doc_id"], item["filter"]): item for item in a["samples"][task]}
        if len(ours) != len(theirs):
            different.append(f"{task}: {len(ours)} items, not {len(theirs)}")
        for item in theirs:
            own = ours[item["doc_id"], item["filter"]]
            where = f"{task} {item['doc_id']}"
            if json.dumps(own["arguments"], sort_keys=True) != json.dumps(item["arguments"], sort_keys=True):
                different.append(f"{where}: another prompt")
            for x, y in zip(own["resps"], item["resps"], strict=True):
                if isinstance(y[0], str):
                    if x != y:
                        different.append(f"{where}: text {x!r}, not {y!r}")
                    continue
                values += 1
                (p, p_greedy), (q, q_greedy) = ((float(v[0][0]), str(v[0][1])) for v in (x, y))
                gap = abs(p - q) / max(1.0, abs(q) / 1000)
                worst = max(worst, gap)
                if gap > SAME:
                    different.append(f"{where}: log-likelihood {p}, not {q}")
                if p_greedy != q_greedy:
                    different.append(f"{where}: greedy {p_greedy}, not {q_greedy}")
            for metric in ("acc", "acc_norm", "exact_match"):
                if metric in item and abs(float(own[metric]) - float(item[metric])) > SAME:
                    totals = sorted(float(v[0][0]) for v in item["resps"])
                    (ties if totals[-1] - totals[-2] < TIED else different).append(f"{where}: {metric}")
    for task, result in b["results"].items():
        for key, value in result.items():
            if isinstance(value, float) and abs(a["results"][task][key] - value) > SAME and not ties:
                different.append(f"{task}: {key} {a['results'][task][key]}, not {value}")
    return {"values": values, "worst": worst, "different": different, "ties": ties}


def shown(name: str, row: dict[str, float]) -> str:
    return f"{name:<10}" + "".join(f"{row[k]:>10.1f}" for k in ("wall", "cpu", "rss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--model", default="", help="a Hugging Face folder; SmolLM2 if not given")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--written", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for an idle machine")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        theirs(*json.loads(args.side))
        return
    from interleaved import wait_until_idle
    from upscale import measure

    from solar_jax.checkpoints.convert import Target, convert_checkpoint
    from solar_jax.checkpoints.open import open_checkpoint

    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        data, tasks = work / "data", work / "tasks"
        cut(args.data.resolve(), data, args.items, args.written)
        short_answers(tasks, data)
        if not (folder := args.model):
            folder = str(work / "model")
            convert_checkpoint(open_checkpoint("smollm2"), Target(work / "model", dtype="float32"), "convert")
        evaluate = [
            f"--model={folder}",
            "--tasks=h6",
            f"--data={data}",
            f"--include_path={tasks}",
            "--dtype=float32",
            "--nocheck_bos",
        ]
        commands = {"ours": [sys.executable, "-m", "solar_jax.evaluate", *evaluate, f"--out={work}/ours.json"]}
        for batch in map(int, args.batches.split(",")):
            side = json.dumps([folder, str(data), str(tasks), batch, f"{work}/batch {batch}.json"])
            commands[f"batch {batch}"] = [sys.executable, __file__, f"--side={side}"]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for repeat in range(args.repeats):
            for name in list(commands)[:: -1 if repeat % 2 else 1]:
                wait_until_idle(time.monotonic() + args.patience)
                runs[name].append(measure(commands[name]))
                print(
                    f"{name:<10}" + "".join(f"{runs[name][-1][k]:>10.1f}" for k in ("wall", "cpu", "rss")), flush=True
                )
        median = {name: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for name, rs in runs.items()}
        results = {name: json.loads((work / f"{name}.json").read_text()) for name in commands}
    print(f"\n{'':<10}{'wall s':>10}{'CPU s':>10}{'peak GiB':>10}")
    for name, row in median.items():
        print(shown(name, row))
    others = [name for name in commands if name != "ours"]
    for key in ("wall", "cpu"):
        best = min(others, key=lambda name: median[name][key])
        print(f"{key}: {median['ours'][key] / median[best][key]:.2f} of {best}")
    print(f"tokens: {results['ours']['tokens']}")
    for name in others:
        found = compare(results["ours"], results[name])
        print(f"{name}: {found['values']} log-likelihoods, the largest difference {found['worst']:.1e}")
        for line in found["different"]:
            print(f"  DIFFERENT {line}")
        for line in found["ties"]:
            print(f"  tie: {line}")


if __name__ == "__main__":
    main()
