"""certificate.json: proof by tensors and logits that a conversion's result matches its source and layer map.

The result is opened like any checkpoint and compared with the source through an independent path: hashes of all bytes,
tensors recomputed in numpy (`recompute`) and streamed logits of both (`streamed_logits`). Deliberately damaged results
go through the same comparison of logits, which must reject them.
"""

import dataclasses
import datetime
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import CERTIFICATE
from solar_jax.checkpoints.hf_families import depth_keys
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import TENSORS, hf_tensors
from solar_jax.checkpoints.verify.recompute import Stored, compare_tensors, grown_tensor, hashed_bytes
from solar_jax.checkpoints.verify.streamed_logits import Distance, Layer, Model, Pass, Step, compare, stream
from solar_jax.cli.progress import byte_bar
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import LayerMap
from solar_jax.model.shapes import param_shapes

TOLERANCE = 1e-4  # absolute, of float32 logits, where no value was changed
SHORT, LONG = (3, 7), 512  # prompts: (count, tokens) of the short ones, tokens of the single long one
CONTROL = 64  # leading tokens of each prompt that damaged results are run on
SEED = 231215166  # for the prompts' tokens
_ROTARY = 10.0  # factor on the rotary base that damages a result
_FAR = 10.0  # where a cast moves logits: a damaged result's mean KL must exceed the result's own by this factor

NOT_CHECKED = (
    "Logits of another implementation, such as transformers: both sides were computed by this program's own model.",
    "The file readers: source and result were read by the same code, except for GGUF's blocks.",
    "What the tokenizer does; its files and the other companions are byte-identical to those of the source.",
    "How far a cast may move logits: this is measured, not judged.",
    "Arithmetic in bfloat16, or on another device than the one named under logits.",
    f"Positions past {LONG}, packed documents, and prompts other than random tokens.",
    f"Damaged results beyond the first {CONTROL} tokens of each prompt.",
    "The arithmetic of a merge: its tensors are computed a second time by the same code, and compared.",
    "That the source is correct, or that the result is useful before training.",
    "That files stay unchanged: lineage and certificate are not signed.",
)


def write_certificate(c: Checkpoint, folder: pathlib.Path, model: pathlib.Path, out: pathlib.Path) -> None:
    """Certifies the result written from `c` and writes certificate.json beside its config.

    Args:
      c: the checkpoint that was meant to be written, usually a view.
      folder: the result, as SRC names it.
      model: the folder of its config.json.
      out: the folder's final name.

    Raises:
      UserError: a check failed; nothing is written then.
    """
    certificate = certify(c, folder, out=out)
    print("\n".join(summary(certificate)), flush=True)
    if wrong := failures(certificate):
        raise UserError(f"{out}: " + "; ".join(wrong) + ".")
    lineage.write_record(model, certificate, CERTIFICATE)


def certify(c: Checkpoint, folder: pathlib.Path, *, out: pathlib.Path | None = None) -> dict[str, Any]:
    """Builds the content of certificate.json; `failures` judges its logits.

    Raises:
      UserError: the config, a companion or a tensor does not match the source.
    """
    opened = open_checkpoint(str(folder))
    fingerprint = lineage.fingerprint(opened) | {"where": lineage.public(str(out or folder))}
    result = dataclasses.replace(opened, where=str(out or folder))
    changed = _check_config(c, result)
    companions = _check_companions(c, result)
    stored = Stored(c)
    with byte_bar(hashed_bytes(stored, result), "certificate") as progress:
        tensors = compare_tensors(stored, result, progress)
    exact = all(record.get("max_abs_difference", 0.0) == 0.0 for record in tensors.values())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": lineage.public_fingerprint(c.source),
        "result": fingerprint,
        "operator": c.layer_map.operator,
        "config_changed": changed,
        "companions_sha256": companions,
        **_logits(stored, result, exact),
        "layer_map": _layer_map(c.layer_map, result, tensors),
        "tensors": tensors,
        "not_checked": list(NOT_CHECKED),
        "versions": lineage.versions(),
    }


def _check_config(c: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """Returns the keys of config.json that differ from the source's; only growth and dtype may change them."""
    source, layer_map, dtype = c.source.hf_config, c.layer_map, c.cast_to
    if layer_map.experts:
        return _check_upcycled_config(c, result)
    must: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in source.items()}
    must |= dict.fromkeys(depth_keys(source), (layer_map.layers,))
    if isinstance(types := source.get("layer_types"), list):
        must["layer_types"] = ([types[i] for i in layer_map.source],)
    if still := c.source.cfg.no_rope_layers:
        must["no_rope_layers"] = ([int(i not in still) for i in layer_map.source],)
        if layer_map.is_identity:
            must["no_rope_layers"] = (source.get("no_rope_layers"),)
    for key in ("dtype", "torch_dtype"):
        stored = dtype or result.common_dtype
        if key in result.hf_config and (stored or key not in source):
            must[key] = (stored,) if dtype else (stored, source.get(key))
    changed = {}
    for key in sorted({*must, *result.hf_config}):
        found, allowed = result.hf_config.get(key), must.get(key, (None,))
        if not any(found == value and type(found) is type(value) for value in allowed):
            raise UserError(f"{result.where}: config.json's {key} must be {allowed[0]!r}, found {found!r}.")
        if found != source.get(key):
            changed[key] = [source.get(key), found]
    return changed


def _check_upcycled_config(c: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """Returns the keys of config.json that differ from the dense source's; its meaning must be the upcycled model."""
    expected = grown_config(c.source.cfg, c.layer_map)
    for field in dataclasses.fields(expected):
        wanted, found = getattr(expected, field.name), getattr(result.cfg, field.name)
        if wanted != found:
            raise UserError(f"{result.where}: config.json must give {field.name}={wanted!r}, found {found!r}.")
    before, after = c.source.hf_config, result.hf_config
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return {key: [before.get(key), after.get(key)] for key in keys}


def _check_companions(c: Checkpoint, result: Checkpoint) -> dict[str, str]:
    """Returns the SHA-256 of each tokenizer, template and generation file, all byte-identical to the source's."""
    found = result.companions
    for name in sorted({*found, *c.companions}):
        if name not in found:
            raise UserError(f"{result.where}: {name} of {c.where} is missing.")
        if found[name] != c.companions.get(name):
            raise UserError(f"{result.where}: {name} is not byte-identical to that of {c.where}.")
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _layer_map(layer_map: LayerMap, result: Checkpoint, tensors: dict[str, Any]) -> list[dict[str, Any]]:
    equal = [True] * layer_map.layers
    for name, _, layer in hf_tensors(result.cfg):
        if layer is not None:
            equal[layer] &= tensors[name]["bitwise_equal"]
    return [
        {
            "layer": i,
            "source": source,
            "partner": None if partner == source else partner,
            "scale": scale,
            "equals_source": same,
        }
        for i, (source, partner, scale, same) in enumerate(
            zip(layer_map.source, layer_map.partner, layer_map.scale, equal, strict=True)
        )
    ]


def prompts(vocab_size: int, max_positions: int) -> list[np.ndarray]:
    """Returns token ids [3, 7] and [1, 512], at most as long as the model has positions; the same ids every time."""
    stream_of_ids = np.random.Generator(np.random.PCG64(SEED))
    return [stream_of_ids.integers(0, vocab_size, (n, min(t, max_positions))) for n, t in (SHORT, (1, LONG))]


def kept_layers(layer_map: LayerMap) -> list[int] | None:
    """Returns the base's own layers if all others add nothing, or None if the layer map changes outputs."""
    if layer_map.experts:
        return None
    kept = [i for i, scale in enumerate(layer_map.scale) if scale != 0]
    as_base = all(layer_map.scale[i] == 1 and layer_map.partner[i] == layer_map.source[i] for i in kept)
    return kept if as_base and [layer_map.source[i] for i in kept] == list(range(layer_map.base_layers)) else None


def _logits(stored: Stored, result: Checkpoint, exact: bool) -> dict[str, Any]:
    """Computes the sections `logits` and `negative_control`.

    Args:
      stored: the base.
      result: the checkpoint made from it.
      exact: whether casting changed no value, so that logits must not change either.
    """
    layer_map = stored.layer_map
    grown = Model(
        grown_config(stored.c.cfg, layer_map),
        lambda path, layer, rows: grown_tensor(stored, path, layer, rows),
    )
    made = Model(result.cfg, lambda path, layer, rows: result.read(TENSORS[path].hf.format(layer), rows))
    tokens = prompts(stored.c.cfg.vocab_size, stored.c.cfg.max_position_embeddings)

    given = [(t, grown.embed(t)) for t in tokens]
    reference, kept = Pass(grown, given), kept_layers(layer_map)
    base = reference if kept is None or len(kept) == layer_map.layers else Pass(grown, given)
    steps = [
        Step(_loader(grown, i), (reference,) if base is reference or i not in (kept or ()) else (reference, base))
        for i in range(layer_map.layers)
    ]

    given = [(t, made.embed(t)) for t in tokens]
    first = [(t[:, :CONTROL], x[:, :CONTROL]) for t, x in given]
    own = Pass(made, given)
    rotary = Pass(made, first, dataclasses.replace(made.cfg, rope_theta=made.cfg.rope_theta * _ROTARY))
    damaged = Pass(made, first)
    what, steps_of_result = _damage(made, layer_map, (own, rotary), damaged)
    steps += steps_of_result
    with byte_bar(len(steps) * _layer_bytes(result.cfg), "logits") as progress:
        stream(steps, progress)

    places = np.split(np.arange(sum(t.size for t in tokens)), np.cumsum([t.size for t in tokens])[:-1])
    places = [place.reshape(t.shape) for place, t in zip(places, tokens, strict=True)]  # of tokens in a Distance
    seen = np.concatenate([place[:, :CONTROL].reshape(-1) for place in places])
    pairs: list[tuple[Pass, Pass, np.ndarray | slice]] = [
        (reference, own, slice(None)), (reference, rotary, seen), (reference, damaged, seen), (base, own, slice(None)),
    ]  # fmt: skip
    distance, by_rotary, by_damage, to_base = compare(pairs)
    return {
        "logits": {
            "of": "float32 logits of the source, grown by the plan, and of the result",
            "computed_on": jax.local_devices()[0].platform,
            "tolerance": TOLERANCE if exact else None,
            "tokens": f"numpy Generator(PCG64({SEED})).integers(0, vocab_size): {SHORT}, then (1, {LONG})",
            "prompts": [
                {"length": len(ids), "tokens": " ".join(map(str, ids)), **distance.over(place)}
                for t, p in zip(tokens, places, strict=True)
                for ids, place in zip(t, p, strict=True)
            ],
            "equals_base": None if kept is None else to_base.over(slice(None))["max_abs_difference"],
        },
        "negative_control": [
            _control(f"rotary base times {_ROTARY:g}", by_rotary, distance, seen, exact),
            _control(what, by_damage, distance, seen, exact),
        ],
    }


def _layer_bytes(cfg: ModelConfig) -> int:
    """Returns the bytes of one layer as `Model.layer` holds it, float32."""
    return 4 * sum(math.prod(s.shape[1:]) for s in jax.tree.leaves(param_shapes(cfg)["layers"]))


def _loader(model: Model, layer: int) -> Callable[[], Layer]:
    return lambda: model.layer(layer)


def different_neighbours(layer_map: LayerMap) -> tuple[int, int] | None:
    """Returns the first two different layers with only layers that add nothing between them, or None."""
    adding = [i for i, scale in enumerate(layer_map.scale) if scale != 0]
    for i, j in itertools.pairwise(adding):
        if {layer_map.source[i], layer_map.partner[i]} != {layer_map.source[j], layer_map.partner[j]}:
            return i, j
    return None


def _damage(model: Model, layer_map: LayerMap, whole: tuple[Pass, ...], damaged: Pass) -> tuple[str, list[Step]]:
    """Returns a description of the damage, and the steps that take `damaged` and the `whole` runs through the model."""
    pair = different_neighbours(layer_map)
    if pair is None:

        def interleaved() -> Layer:
            layer = model.layer(0)
            q = layer["q_proj"]
            pairs = q.reshape(*q.shape[:-1], 2, q.shape[-1] // 2).swapaxes(-1, -2)
            return layer | {"q_proj": pairs.reshape(q.shape)}

        steps = [Step(_loader(model, i), (*whole, damaged) if i else whole) for i in range(layer_map.layers)]
        return "rows of layer 0's q_proj interleaved", [Step(interleaved, (damaged,)), *steps]
    i, j = pair
    steps = []
    for k in range(layer_map.layers):
        steps.append(Step(_loader(model, k), whole if i <= k < j else (*whole, damaged)))
        if k == j:
            steps += [Step(_loader(model, other), (damaged,)) for other in (*range(i + 1, j), i)]
    return f"layers {i} and {j} swapped", steps


def _control(what: str, found: Distance, honest: Distance, seen: np.ndarray, exact: bool) -> dict[str, Any]:
    """Returns a damaged result's figures, and whether the check that the result must pass rejects it."""
    figures = found.over(slice(None))
    key = "max_abs_difference" if exact else "mean_kl"
    threshold = TOLERANCE if exact else _FAR * honest.over(seen)["mean_kl"]
    detected = not figures[key] <= threshold
    return {"damage": what, **figures, "judged_by": key, "threshold": threshold, "detected": detected}


def failures(certificate: dict[str, Any]) -> list[str]:
    """Lists what the logits say against the result, each as a clause."""
    logits, wrong = certificate["logits"], []
    tolerance = logits["tolerance"]
    for i, prompt in enumerate(logits["prompts"]):
        difference = prompt["max_abs_difference"]
        if not np.isfinite([difference, prompt["mean_kl"]]).all():
            wrong.append(f"logits of prompt {i} are not finite")
        elif tolerance is not None and difference > tolerance:
            wrong.append(f"logits of prompt {i} must be within {tolerance:g} of the source's, found {difference:.2g}")
    if tolerance is not None and not (logits["equals_base"] or 0.0) <= tolerance:
        wrong.append(f"logits must be within {tolerance:g} of the base's, found {logits['equals_base']:.2g}")
    if not wrong:
        for control in certificate["negative_control"]:
            if not control["detected"]:
                figure = f"{control['judged_by']} {control[control['judged_by']]:.2g}"
                wrong.append(
                    f"the logits cannot tell a damaged result ({control['damage']}: {figure}) from a sound one"
                )
    return wrong


def summary(certificate: dict[str, Any]) -> Sequence[str]:
    """Formats a four-line summary."""
    tensors, logits = certificate["tensors"].values(), certificate["logits"]
    result, source = certificate["result"]["where"], certificate["source"]["where"]
    equal = sum(record["bitwise_equal"] for record in tensors)
    worst = max(logits["prompts"], key=lambda p: p["max_abs_difference"])
    bound = "a cast moves them" if logits["tolerance"] is None else f"at most {logits['tolerance']:g}"
    base = "" if logits["equals_base"] is None else f"; from the base's {logits['equals_base']:.2g}"
    controls = [
        f"{control['damage']} {control['max_abs_difference']:.2g} {'rejected' if control['detected'] else 'MISSED'}"
        for control in certificate["negative_control"]
    ]
    return (
        f"certificate of {result}, {certificate['operator']} of {source}",
        f"  tensors: {equal} of {len(tensors)} bitwise equal to the source's, {len(tensors) - equal} recomputed",
        f"  logits: up to {worst['max_abs_difference']:.2g} from the source's ({bound}){base}",
        f"  deliberately damaged: {', '.join(controls)}",
    )
