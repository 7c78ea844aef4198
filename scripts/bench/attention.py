"""Compiles the training step of models with heads of 64 for TPU slices, with each attention there is.

    python scripts/bench/attention.py --slices v5e-8,v5p-16,v6e-8

Needs the extra `tpu` (libtpu) and no TPU. Each is a value of config.train.attention: "flash", this package's kernels,
"splash", jax's own, "xla", array operations with scores of T x T in HBM. Memory is the compiler's, and so are the
seconds, as `aot.py` reads them.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

from solar_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from solar_jax.hardware.slices import find_slice
from solar_jax.planning.aot import compile_step

GIB = 2**30
# Depth after growth.
MODELS = {
    "SmolLM2-135M": ModelConfig(49152, 576, 1536, 48, 9, 3, 64, 8192, 1e5, 1e-5, tie_word_embeddings=True),
    "Llama-3.2-1B": ModelConfig(128256, 2048, 8192, 24, 32, 8, 64, 131072, 5e5, 1e-5, tie_word_embeddings=True),
}


def measure(cfg: ModelConfig, config: Config, name: str) -> str:
    """Returns memory and time of a step, or what the compiler says."""
    try:
        step = compile_step(cfg, config, find_slice(name))
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return "does not fit"
    overlapped, serial = step.program.seconds()
    return f"{step.total / GIB:6.2f} GiB  {1e3 * overlapped:8.1f} / {1e3 * serial:8.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default="v5e-8,v5p-16,v6e-8")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=2, help="rows a device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="attention")
    args = parser.parse_args()
    for name in args.slices.split(","):
        for model in args.models.split(","):
            for kind in ("flash", "splash", "xla"):
                rows = args.batch * find_slice(name).devices
                train = TrainConfig(10, rows, 1, remat=args.remat, attention=kind)
                data = DataConfig(sequence_length=args.length)
                config = Config(name="attention", data=data, train=train, mesh=MeshConfig(1, -1, 1, 1))
                said = measure(MODELS[model], config, name)
                print(f"{name:8} {model:14} {args.batch} x {args.length} {kind:7} {said}", flush=True)


if __name__ == "__main__":
    main()
