"""llama.cpp's side of `decode.py`: steps of SmolLM2 in float32, by an environment with xllamacpp and gguf.

PYTHON scripts/bench/llama_cpp.py FILE.gguf ROWS NEW PROMPT_FILE
"""

import concurrent.futures
import os
import pathlib
import sys
import tempfile

import gguf
import numpy as np
import xllamacpp
from interleaved import serve

THREADS = 2


def widen(source: str, target: str) -> None:
    """Writes a GGUF file again with all tensors in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = 0 if name == "general.file_type" else field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, wide.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    source, rows, new, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]).read_text()
    with tempfile.TemporaryDirectory() as folder:
        widen(source, f"{folder}/wide.gguf")
        params = xllamacpp.CommonParams()
        params.model.path = f"{folder}/wide.gguf"
        params.n_ctx, params.n_parallel = 512 * rows, rows
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        server = xllamacpp.Server(params)
    asked = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def step(_: int) -> dict[str, float]:
        before = os.times()
        with concurrent.futures.ThreadPoolExecutor(rows) as pool:
            made = list(pool.map(server.handle_completions, [asked] * rows))
        spent = sum(os.times()[:2]) - sum(before[:2])
        times = [one["timings"] for one in made]
        assert all(one["predicted_n"] == new for one in times)
        # Its own time of the tokens after a row's prompt; in a batch it includes other rows' prompts.
        return {"decode": max(one["predicted_ms"] for one in times) / 1e3, "decode_cpu": spent}

    serve(step, lambda: "", f"xllamacpp {getattr(xllamacpp, '__version__', '')}")


if __name__ == "__main__":
    main()
