"""Compiles MaxText's training step of a Mistral-7B of any depth for a TPU slice, without having one.

Runs in MaxText's environment (maxtext[tpu]==0.2.5), started by `aot.py --peer`:

    python maxtext_step.py OUT.txt NAME=VALUE ...

The names are those of MaxText's config. Writes the optimised program to OUT.txt and, as the last line of its output,
{"seconds", "arguments", "temporaries"} as JSON: CPU time of compilation, and bytes per chip.
"""

import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import maxtext
from maxtext.trainers.pre_train import train_compile

GIVEN = {
    "model_name": "mistral-7b",
    "override_model_config": "true",
    "dataset_type": "synthetic",
    "run_name": "aot",
    "enable_checkpointing": "false",
    "opt_type": "adamw",
    "weight_dtype": "float32",
    "dtype": "bfloat16",
    "attention": "flash",
    "compile_topology_num_slices": "1",
}


def main() -> None:
    out, *settings = sys.argv[1:]
    found: dict[str, float] = {}
    compile_step = train_compile.jit_and_compile

    def observed(*args, **kwargs):
        begin = time.process_time()
        compiled = compile_step(*args, **kwargs)
        m = compiled.memory_analysis()
        found["seconds"] = time.process_time() - begin
        found["arguments"], found["temporaries"] = m.argument_size_in_bytes, m.temp_size_in_bytes
        pathlib.Path(out).write_text(compiled.as_text())
        return compiled

    train_compile.jit_and_compile = observed
    with tempfile.TemporaryDirectory() as folder:
        # Its data pipeline needs a tokenizer even for synthetic data: the smallest that loads.
        (pathlib.Path(folder) / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
        )
        (pathlib.Path(folder) / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a"})
        )
        GIVEN["base_output_directory"] = GIVEN["tokenizer_path"] = folder
        base = pathlib.Path(next(iter(maxtext.__path__))) / "configs" / "base.yml"
        train_compile.main([sys.argv[0], str(base), *(f"{key}={value}" for key, value in GIVEN.items()), *settings])
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
