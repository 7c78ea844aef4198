"""Serve a model to OpenAI's clients.

    python -m solar_jax.serve --model SRC [--host 127.0.0.1] [--port 8000] [--rows 8] [--context N]

/v1/completions, /v1/chat/completions, /v1/models and /health, with streams and log-probabilities. Requests share the
rows; what finds none waits in a queue. Another address than this machine's own needs --api_key_file. SIGTERM or Ctrl-C
lets running answers end. Needs the extra `serve`.
"""

import dataclasses
import importlib.util
import socket
from collections.abc import Sequence

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import DTYPES
from solar_jax.errors import UserError
from solar_jax.serving.address import bind_address, open_to_clients, read_keys, url_of

_LEAST_CONTEXT = 16
_bound: list[socket.socket] = []  # what `check` took, so that a port in use is known before the model is loaded


def define_flags() -> None:
    flags.DEFINE_string("model", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_string("name", None, "Name by which clients ask for the model; the last part of SRC if not given.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of weights, activations and cache.")
    flags.DEFINE_enum("quantize", "", ("", "int8"), "Dtype of the projections' weights, if not the others'.")
    flags.DEFINE_integer("rows", 8, "Responses that are generated side by side.")
    flags.DEFINE_integer("context", 0, "Most tokens of a prompt with its answer; the model's own if 0.")
    flags.DEFINE_integer("queue", 64, "Responses that may wait for a row before more are refused with status 429.")
    flags.DEFINE_string("api_key_file", None, "File of keys, one a line; a client has to give one of them.")
    flags.DEFINE_bool("compilation_cache", True, "Reuse compiled programs at the next start.")
    flags.DEFINE_bool("warm_up", True, "Compile for a short prompt before /health says ready.")
    flags.DEFINE_float("grace", 30.0, "Seconds that running answers may go on after SIGTERM.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.model:
        raise UserError("serve needs --model SRC.")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs {package}, which is not installed; it comes with the extra `serve`.")
    for name, value in (("rows", f.rows), ("queue", f.queue)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}.")
    if f.context and f.context < _LEAST_CONTEXT:
        raise UserError(f"--context must be at least {_LEAST_CONTEXT}, or 0 for the model's own, found {f.context}.")
    if f.grace < 0:
        raise UserError(f"--grace must not be negative, found {f.grace:g}.")
    if not 0 <= f.port < 1 << 16:
        raise UserError(f"--port must be from 0 to {(1 << 16) - 1}, found {f.port}.")
    check_local(f.model)
    keys = read_keys(f.api_key_file)
    _bound[:] = [bind_address(f.host, f.port, has_keys=bool(keys))]


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

import jax

from solar_jax.checkpoints.checkpoint import numpy_dtype
from solar_jax.checkpoints.lineage import public
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.engine import Engine, Request
from solar_jax.decoding.forward import cache_bytes
from solar_jax.decoding.model import Loaded, load_model


def main(argv: Sequence[str]) -> None:
    del argv
    from solar_jax.serving.app import Service, make_app  # imported here: they need the extra
    from solar_jax.serving.server import run_server
    from solar_jax.serving.token_bytes import TokenBytes
    from solar_jax.serving.worker import Worker

    f = flags.FLAGS
    (sock,) = _bound
    keys = read_keys(f.api_key_file)
    name = f.name or public(f.model.rstrip("/"))
    model = load_model(open_checkpoint(f.model), f.dtype, quantize=f.quantize)
    engine = model.engine(rows=f.rows, context=f.context)
    _check_cache(engine)
    print(_announced(model, engine, name, f.rows), flush=True)
    model = dataclasses.replace(model, params={})  # the engine has its own
    worker = Worker(engine, rows=f.rows, most_waiting=f.queue)
    gate = make_app(Service(name, model, engine, worker, TokenBytes(model.tokenizer)), keys)
    print(f"address  {url_of(sock)}, {'with a key' if keys else 'without a key'}", flush=True)
    open_to_clients(sock)
    worker.start(warm_up=f.warm_up, then=lambda: print("ready", flush=True))
    run_server(gate, worker, sock, grace=f.grace)


def _check_cache(engine: Engine) -> None:
    """Raises a UserError where the whole cache would not fit beside the weights."""
    try:
        engine.check(Request((0,), engine.context - 1))
    except UserError as e:
        raise UserError(f"{e} Give fewer --rows or a shorter --context.") from e


def _announced(model: Loaded, engine: Engine, name: str, rows: int) -> str:
    """Says what is about to be served."""
    leaves = jax.tree.leaves(model.params)
    cache = cache_bytes(model.cfg, rows, engine.context, numpy_dtype(model.dtype))
    return (
        f"model    {name}: {sum(x.size for x in leaves):,} parameters, {model.dtype}, "
        f"{sum(x.nbytes for x in leaves):,} bytes on {jax.device_count()} {jax.default_backend()} device(s)\n"
        f"rows     {rows} of at most {engine.context:,} tokens, cache of at most {cache:,} bytes"
    )


if __name__ == "__main__":
    command.start(main)
