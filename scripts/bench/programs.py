"""One training step by this package and by transformers on torch, with equal weights, batches, loss and optimiser."""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.config import Config
from solar_jax.hardware import chips
from solar_jax.model.precision import compute_dtype, precision
from solar_jax.model.shapes import param_shapes
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from solar_jax.training.optimizer import learning_rate, make_optimizer
from solar_jax.training.state import state_shardings
from solar_jax.training.step import make_train_step

Step = Callable[[int], float]  # step number -> its loss
Profile = Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Work:
    """Work that both programs do."""

    checkpoint: Checkpoint  # initial weights
    config: Config  # optimiser, precision, and what of `train` concerns this package alone
    batches: list[dict[str, np.ndarray]]  # cycled through in order; "tokens", "targets", ... [B, T]


def ours(work: Work, options: dict[str, str] | None = None) -> tuple[Step, Profile]:
    """Builds the step as `solar_jax.train` compiles and runs it, with compiler `options` added to the device's own."""
    config, cfg = work.config, work.checkpoint.cfg
    mesh, optimizer = (
        make_mesh(config.mesh),
        make_optimizer(config.optimizer, config.train.steps, precision(config.train), seed=config.seed),
    )
    shardings = state_shardings(cfg, optimizer, mesh)
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(cfg, precision(config.train).weights))
    params = load_params(work.checkpoint, shardings["params"], dtypes)
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=shardings["opt_state"])(params)}
    del params  # the step takes their memory

    def batch(number: int) -> dict[str, jax.Array]:
        return jax.device_put(work.batches[number % len(work.batches)], rules.batch_sharding(mesh))

    lowered = make_train_step(cfg, config.train, config.data.sequence_length, optimizer, mesh).lower(state, batch(0))
    compiled = lowered.compile(dict(chips.compiler_options(jax.devices()[0])) | (options or {}) or None)

    def step(number: int) -> float:
        nonlocal state
        state, measured = compiled(state, batch(number))
        jax.block_until_ready(state)
        return float(measured["loss"])

    def profile() -> str:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                step(0)
            (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
            return table(_operations(jax.profiler.ProfileData.from_file(str(file)), compiled.as_text() or ""))

    return step, profile


# Kind of an operation by its name and, for XLA's, by its origin in the program; the first match counts.
KINDS = (
    ("optimiser", r"adamw|foreach|linalg_vector_norm|global_norm|jit\(train_step\)/[^/(]*$"),
    ("attention", r"scaled_dot_product|attention.*(bk|softmax|where|div|exp|reduce)|bmm|softmax(?!.*log)"),
    ("matmuls", r"aten::(mm|addmm)|dot_general|,[a-z]+->|\bdot\b"),
    ("loss", r"log_softmax|nll|cross_entropy|\.\.\.d,dv|logsumexp|jvp\(\)/while/body/eval_jaxpr/(jvp|transpose)"),
)


def _operations(data: Any, hlo: str) -> dict[str, float]:
    """Returns the seconds of every operation that XLA ran, named with its origin, excluding its callees' time."""
    origin = {}
    for name, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", hlo, re.MULTILINE):
        found = re.search(r'op_name="([^"]*)"', rest)
        origin[name] = f"{name} {found[1] if found else ''}"
    seconds: collections.Counter[str] = collections.Counter()
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")] or list(data.planes)
    for line in (line for plane in planes for line in plane.lines):
        events = []
        for event in line.events:
            name = event.name.lstrip("%")
            if name not in origin:  # GPU kernels have their own names
                name = str(dict(event.stats).get("hlo_op", "")) if line.name.startswith("Stream") else ""
            if name in origin and event.duration_ns > 0:
                events.append((event.start_ns, event.duration_ns, origin[name]))
        open_: list[tuple[float, str]] = []  # (end, name) of what is running
        for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
            while open_ and open_[-1][0] <= start:
                open_.pop()
            if open_:
                seconds[open_[-1][1]] -= duration / 1e9
            seconds[name] += duration / 1e9
            open_.append((start + duration, name))
    return dict(seconds)


def table(seconds: dict[str, float], longest: int = 12) -> str:
    """Formats shares by kind, then the longest operations."""
    total = sum(seconds.values())
    kinds: collections.Counter[str] = collections.Counter()
    for name, spent in seconds.items():
        kinds[next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")] += spent
    lines = [f"  {spent:7.3f} s  {100 * spent / total:5.1f} %  {kind}" for kind, spent in kinds.most_common()]
    lines.append("  of which the longest operations")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:longest]:
        lines.append(f"  {spent:7.3f} s  {100 * spent / total:5.1f} %  {name[:40]} {name[40:][-60:]}")
    return "\n".join(lines)


def theirs(work: Work, attention: str, compiles: bool, device: str) -> tuple[Step, Profile]:
    """Builds the step of transformers' model and torch's optimiser, in the fastest form that torch has for the device.

    Args:
      work: the work; its precision "mixed" is autocast.
      attention: transformers' `attn_implementation`.
      compiles: whether the model goes through torch.compile.
      device: torch's device.
    """
    import torch
    import transformers

    config, checkpoint = work.config, work.checkpoint
    dtype = getattr(torch, str(compute_dtype(config.train)))
    torch.backends.cuda.matmul.allow_tf32 = dtype is not torch.float32
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**checkpoint.hf_config), attn_implementation=attention, dtype=torch.float32
    )
    weights = {name: torch.from_numpy(np.array(checkpoint.read(name), np.float32)) for name in checkpoint.shape_of}
    lacking = model.load_state_dict(weights, strict=False)
    if lacking.unexpected_keys or set(lacking.missing_keys) - set(model._tied_weights_keys or ()):
        raise SystemExit(f"transformers' model has different tensors: {lacking}.")
    model.to(device).train()
    parameters = list(model.parameters())
    o = config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.b1, o.b2), eps=o.eps, fused=True)
    rate = learning_rate(o, config.train.steps)
    rates = [float(rate(i)) for i in range(config.train.steps)]
    forward = torch.compile(model) if compiles else model

    def step(number: int) -> float:
        batch = work.batches[number % len(work.batches)]
        tokens, targets = (torch.from_numpy(batch[name]).long().to(device) for name in ("tokens", "targets"))
        for group in optimizer.param_groups:
            group["lr"] = rates[min(number, len(rates) - 1)]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        if o.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        optimizer.step()
        return loss.item()

    def timed(number: int) -> float:
        loss = step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss

    def profile() -> str:
        with torch.profiler.profile() as recorded:
            timed(0)
        return table(
            {
                e.key: (e.self_device_time_total if device == "cuda" else e.self_cpu_time_total) / 1e6
                for e in recorded.key_averages()
            }
        )

    return timed, profile
