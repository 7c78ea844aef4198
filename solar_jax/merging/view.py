"""A merge as a view of checkpoints: nothing is computed before a tensor is read, and only the rows that are read."""

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from solar_jax.checkpoints.adapters import is_peft, open_peft
from solar_jax.checkpoints.checkpoint import Checkpoint, Origin, numpy_dtype
from solar_jax.checkpoints.find import find_checkpoint
from solar_jax.checkpoints.hf_config import grown_hf_config, model_config, with_dtype
from solar_jax.checkpoints.hf_families import fused_tensors, stored_name
from solar_jax.checkpoints.lineage import fingerprint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors
from solar_jax.errors import UserError
from solar_jax.merging.methods import METHODS, Method
from solar_jax.merging.parameters import Values, values_for
from solar_jax.merging.recipe import Recipe, Section, Settings
from solar_jax.merging.tensors import Input, Stack, in_order
from solar_jax.merging.vocabulary import chat_template_files, merged_vocabulary

_MAY_DIFFER = ("vocab_size", "num_hidden_layers", "no_rope_layers")
# Numbers of the config that need not agree; those of the first model are used.
_NUMBERS = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "sliding_window")


def open_model(name: str) -> Checkpoint:
    """Opens an input of a recipe: SRC, or SRC+ADAPTER with a PEFT adapter.

    Raises:
      UserError: bad SRC, or a revision.
    """
    try:
        return open_checkpoint(name)
    except UserError:
        base, plus, adapter = name.rpartition("+")
        if not plus:
            raise
    folder = find_checkpoint(adapter)
    if not is_peft(folder):
        raise UserError(f"{name}: {adapter} must be a PEFT adapter.")
    return open_peft(folder, lambda _: open_checkpoint(base))


def merged(recipe: Recipe, opened: Mapping[str, Checkpoint] | None = None) -> Checkpoint:
    """The merged checkpoint.

    Args:
      recipe: what is merged, and how.
      opened: checkpoints by the recipe's names; opened here if None.

    Raises:
      UserError: the method or a parameter is unknown, or the inputs do not fit together; no weights are read before
        the recipe is known to be sound. Reading raises one for a value that is not finite.
    """
    method = _method(recipe)
    models = dict(opened or {name: open_model(name) for name in recipe.models})
    first = models[recipe.models[0]]
    _check_inputs(recipe, method, models)
    layers = [
        (section, i, count) for section in recipe.sections for count in [_count(section, models)] for i in range(count)
    ]
    hf_config = _hf_config(recipe, models, layers)
    vocabulary = merged_vocabulary(recipe, models)
    if vocabulary:
        models, hf_config = dict(vocabulary.models), hf_config | vocabulary.hf_config
    cfg = model_config(hf_config, first.where)
    tensors = {
        name: _tensor(recipe, method, models, name, path, layer, layers, hf_config, hf_shape(path, cfg))
        for name, path, layer in hf_tensors(cfg)
    }
    companions = vocabulary.companions if vocabulary else first.companions
    used = list({id(models[name]): models[name] for name in recipe.models}.values())
    return Checkpoint(
        where=f"{recipe.method} of {', '.join(name.rpartition('/')[2] or name for name in recipe.models)}",
        hf_config=hf_config,
        cfg=cfg,
        companions=companions | chat_template_files(recipe, models, companions),
        shape_of={name: tensor.stack.shape for name, tensor in tensors.items()},
        dtype_of={name: numpy_dtype(tensor.out) for name, tensor in tensors.items()},
        read=lambda name, rows=slice(None): tensors[name].read(rows),
        entry_of={name: c.entry_of[own] for name, (c, own) in _copies(tensors) if own in c.entry_of},
        files=tuple(file for c in used for file in c.files),
        origins={name: tensor.origin for name, tensor in tensors.items()},
        merged_from=tuple(used),
        recipe=_record(recipe, used),
    )


def _copies(tensors: Mapping[str, "_Merged"]) -> list[tuple[str, tuple[Checkpoint, str]]]:
    return [(name, tensor.copy) for name, tensor in tensors.items() if tensor.copy is not None]


def _record(recipe: Recipe, models: list[Checkpoint]) -> dict[str, Any]:
    """The recipe and its inputs as JSON: for the lineage, and to know the same job again."""
    return {"recipe": dataclasses.asdict(recipe), "inputs": [fingerprint(c) for c in models]}


def _method(recipe: Recipe) -> Method:
    if recipe.method not in METHODS:
        raise UserError(f"merge_method must be one of {', '.join(METHODS)}, found {recipe.method!r}.")
    method = METHODS[recipe.method]
    known = {key for other in METHODS.values() for key in other.parameters}
    of_inputs = [source.parameters for section in recipe.sections for source in section.sources]
    shared = [*(section.parameters for section in recipe.sections), *recipe.parameters]
    for place, settings in [*((1, s) for s in of_inputs), *((0, s) for s in shared)]:
        _check_names(recipe.method, method, known, settings, of_input=bool(place))
    return method


def _check_names(name: str, method: Method, known: set[str], settings: Settings, *, of_input: bool) -> None:
    for key in settings:
        if key not in known:
            raise UserError(f"parameters.{key} is unknown; {name} has {', '.join(method.parameters)}.")
        parameter = method.parameters.get(key)
        if parameter is None:
            print(f"parameters.{key} does nothing with {name}", flush=True)
        elif of_input and parameter.scope == "shared":
            raise UserError(
                f"parameters.{key} of {name} is for all models at once, found it in one model's parameters."
            )


def _count(section: Section, models: Mapping[str, Checkpoint]) -> int:
    """How many layers a range makes."""
    counts = {}
    for source in section.sources:
        depth = models[source.model].cfg.num_hidden_layers
        start, stop = source.layers or (0, depth)
        if stop > depth:
            raise UserError(f"{source.model}: layer_range [{start}, {stop}] is outside the model's {depth} layers.")
        counts[source.model, source.layers] = stop - start
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{model} {count}" for (model, _), count in counts.items())
        raise UserError(f"all inputs must have the same number of layers, found {found}.")
    return next(iter(counts.values()))


def _check_inputs(recipe: Recipe, method: Method, models: Mapping[str, Checkpoint]) -> None:
    for section in recipe.sections:
        names = [source.model for source in section.sources]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"{twice[0]} is an input twice; each model of a merge must be named once.")
        has_base = method.base != "ignored" and section.base in names
        if method.base == "required" and not has_base:
            said = f"found {section.base}, which is not among the sources" if section.base else "found none"
            raise UserError(f"{recipe.method} needs a base_model, {said}.")
        for what, count, (least, most) in (
            ("models", len(names), method.inputs), ("models besides the base", len(names) - has_base, method.others),
        ):  # fmt: skip
            if not least <= count <= most:
                wanted = f"{least}" if least == most else f"at least {least}" if most > 1e9 else f"at most {most}"
                raise UserError(f"{recipe.method} needs {wanted} {what}, found {count}: {', '.join(names)}.")
    _check_alike(recipe, method, models)


def _check_alike(recipe: Recipe, method: Method, models: Mapping[str, Checkpoint]) -> None:
    (first_name, first), *rest = models.items()
    if method.prepare and fused_tensors(first.hf_config):
        raise UserError(
            f"{first_name}: {recipe.method} looks at full tensors, and {first.hf_config.get('model_type')} fuses "
            "queries, keys and values into one; linear and task_arithmetic merge such models."
        )
    for name, c in rest:
        kinds = [x.hf_config.get("model_type") for x in (first, c)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{name}: model_type must be {kinds[0]!r} as that of {first_name}, found {kinds[1]!r}.")
        for key, expected in vars(first.cfg).items():
            found = getattr(c.cfg, key)
            if found == expected or key in _MAY_DIFFER:
                continue
            if key not in _NUMBERS:
                raise UserError(f"{name}: {key} must be {expected!r} as that of {first_name}, found {found!r}.")
            print(
                f"{name}: {key} is {found!r}, that of {first_name} {expected!r}; the result has the latter", flush=True
            )
        if recipe.vocabulary is None and c.cfg.vocab_size != first.cfg.vocab_size:
            raise UserError(
                f"{name}: vocab_size must be {first.cfg.vocab_size} as that of {first_name}, found "
                f"{c.cfg.vocab_size}; tokenizer_source says how to merge vocabularies."
            )


def _hf_config(
    recipe: Recipe, models: Mapping[str, Checkpoint], layers: list[tuple[Section, int, int]]
) -> dict[str, Any]:
    donor = models[recipe.models[0]]
    # Per-layer keys are taken by the first source's layers, which are as good as any other's.
    source = [(section.sources[0].layers or (0, 0))[0] + i for section, i, _ in layers]
    owners = {section.sources[0].model for section, *_ in layers}
    if source != list(range(donor.cfg.num_hidden_layers)):
        depth = min(models[name].cfg.num_hidden_layers for name in owners)
        hf_config = grown_hf_config(donor.hf_config, source if max(source) < depth else [0] * len(source))
    else:
        hf_config = donor.hf_config
    return with_dtype(hf_config, recipe.out_dtype or recipe.dtype)


@dataclasses.dataclass
class _Merged:
    """One tensor of the result."""

    method: Method
    stack: Stack
    values: Values
    name: str
    seed: int
    out: str  # dtype
    origin: Origin
    copy: tuple[Checkpoint, str] | None  # the tensor that it is, bit by bit
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @functools.cached_property
    def _prepared(self) -> Any:
        return self.method.prepare(self.stack, self.values, self.name, self.seed) if self.method.prepare else None

    def read(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.stack.shape[0])
        if self.copy is not None:
            return self.stack.inputs[0].read(slice(start, stop))
        with self._lock:  # writers read from several threads
            prepared = self._prepared
        out = np.empty((stop - start, self.stack.columns), numpy_dtype(self.out))

        def fill(block: slice) -> None:
            for at, xs in self.stack.pieces(block):
                found = self.stack.round(self.method.combine(self.stack, xs, at, self.values, prepared))
                with np.errstate(over="ignore"):
                    out[at.start - start : at.stop - start] = found

        in_order(fill, self.stack.blocks(slice(start, stop)))
        return out.reshape(stop - start, *self.stack.shape[1:])


def _tensor(
    recipe: Recipe, method: Method, models: Mapping[str, Checkpoint], name: str, path: str, layer: int | None,
    layers: list[tuple[Section, int, int]], hf_config: dict[str, Any], shape: tuple[int, ...],
) -> _Merged:  # fmt: skip
    if layer is None:
        # What comes before the layers belongs to the first range, what comes after to the last; position 0 in both.
        section, position = recipe.sections[0 if path == "embed" else -1], 0.0
        names = [name] * len(section.sources)
    else:
        section, i, count = layers[layer]
        position = i / (count - 1) if count > 1 else 1.0
        names = [TENSORS[path].hf.format((source.layers or (0, 0))[0] + i) for source in section.sources]
    given = [models[source.model] for source in section.sources]
    for c, own, source in zip(given, names, section.sources, strict=True):
        if c.shape_of[own] != shape:
            raise UserError(f"{source.model}: {own} must be of shape {list(shape)}, found {list(c.shape_of[own])}.")
    stored = [stored_name(x, hf_config) for x in (name, *names)]
    values = values_for(method.parameters, recipe, section, position, stored[0], stored[1:])
    method.check(values)
    dtype = recipe.dtype or functools.reduce(
        _wider, [c.dtype_of[own].name for c, own in zip(given, names, strict=True)]
    )
    out = recipe.out_dtype or dtype
    stack = Stack(
        tuple(
            Input(source.model, own, functools.partial(c.read, own))
            for source, c, own in zip(section.sources, given, names, strict=True)
        ),
        shape,
        dtype,
        next((i for i, source in enumerate(section.sources) if source.model == section.base), None)
        if method.base != "ignored"
        else None,
    )
    is_copy = (
        recipe.method == "passthrough"
        and values.of_input[0]["scale"] in (None, 1.0)
        and {given[0].dtype_of[names[0]].name} == {dtype, out}
    )
    origin = given[0].origin(names[0]) if is_copy else ("merge", id(models), name)
    return _Merged(method, stack, values, name, recipe.seed, out, origin, (given[0], names[0]) if is_copy else None)


def _wider(a: str, b: str) -> str:
    """A dtype that holds the values of both: of two different ones always float32."""
    return a if a == b else "float32"
