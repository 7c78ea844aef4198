"""report.md: the main findings in plain words, with the pictures."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solar_jax.growth.picture import layer_list
from solar_jax.inspecting.weights import ALL

Model = dict[str, Any]  # as in seam.json
_SHOWN = 6  # seams, blocks or layers that are named one by one
_SURE = 2.0  # standard errors that make a change of the loss one


def seam_report(content: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Writes the report of seam.json's content; `pictures` are the names of those that were drawn."""
    models = content["models"]
    lines = [
        "# What the seam does",
        "",
        f"Measured on {content['rows']} rows of {content['length']} tokens from {content['documents']} held-out "
        f"document(s) of {content['text']}, in {content['dtype']}. Losses are in nats per token; +- is the standard "
        "error over rows, of changes that of the differences row by row; it is too small where rows share documents. "
        "All numbers are in `seam.json`, with their definitions.",
        "",
        "| model | layers | layer map | new layers | loss |",
        "|---|---|---|---|---|",
        *(_row(model) for model in models),
        "",
    ]
    lines += [f"{one['model']} - {one['minus']}: {_signed(one)} nats, row by row.\n" for one in content["differences"]]
    for model in models:
        notes = [*model["layer_map"]["notes"], model["moved"].get("from") or model["moved"].get("left_out")]
        lines += [f"{model['name']}: {' '.join(notes)}", ""]
    for name, (title, said) in SECTIONS.items():
        found = [f"- {model['name']}: {sentence}" for model in models for sentence in said(model)]
        if name in pictures or found:
            lines += [f"## {title}", "", *found, ""] + ([f"![{title}]({name}.png)", ""] if name in pictures else [])
    return "\n".join(lines)


def _row(model: Model) -> str:
    its, loss = model["layer_map"], model["loss"]
    error = "" if loss["error"] is None else f" +- {loss['error']:.3f}"
    new = layer_list(its["new"]) or "none"
    return f"| {model['name']} | {model['layers']} | {its['operator']} | {new} | {loss['mean']:.4f}{error} |"


def _signed(change: Mapping[str, Any]) -> str:
    error = "" if change["error"] is None else f" +- {change['error']:.4f}"
    return f"{change['difference']:+.4f}{error}"


def _mean(values: Sequence[float | None], layers: Sequence[int]) -> float | None:
    found = [v for i in layers if (v := values[i]) is not None]
    return statistics.fmean(found) if found else None


def _parts(model: Model) -> tuple[list[int], list[int]]:
    """New layers and the others."""
    new = model["layer_map"]["new"]
    return new, [i for i in range(model["layers"]) if i not in new]


# ---- Findings: each takes a model and returns sentences --------------------------------------------------------------
def _stream(model: Model) -> list[str]:
    said = []
    for seam in model["seams"][:_SHOWN]:
        a, b = seam["source"]
        where = f"at the seam {seam['after']}|{seam['after'] + 1} source layer {b} follows {a}"
        if seam["twin"] is None:
            said.append(f"{where}; it stands nowhere before.")
            continue
        said.append(
            f"{where}. The stream that enters it is {seam['norm_ratio']:.2f} times as long as at its first place, "
            f"layer {seam['twin']} (medians over tokens), and its cosine with that is {seam['input_cosine']:.3f}."
        )
    cosine = model["stream"]["cosine"]
    inner = range(1, len(cosine) - 1)
    if inner:
        low = min(inner, key=lambda i: cosine[i])
        said.append(
            f"between the first and the last layer, layer {low} turns the stream most (cosine {cosine[low]:.3f}; "
            f"median {statistics.median(cosine[i] for i in inner):.3f})."
        )
    return said


def _lens(model: Model) -> list[str]:
    kl, agreement = model["lens"]["kl"], model["lens"]["agreement"]
    rising = [i for i in range(len(kl) - 1) if kl[i + 1] > kl[i]]
    half = next(i for i, share in enumerate(agreement) if share >= 0.5)
    said = [
        f"at the input of layer {half} of {model['layers']}, half of the likeliest tokens are the final ones."
        if half < model["layers"]
        else "at no layer's input are half of the likeliest tokens the final ones.",
        f"layers that take the prediction away from the final one (the KL rises): {layer_list(rising) or 'none'}.",
    ]
    for seam in model["seams"][:_SHOWN]:
        if (twin := seam["twin"]) is not None:
            layer = seam["after"] + 1
            said.append(
                f"source layer {seam['source'][1]} is entered at a KL of {kl[twin]:.2f} nats first (layer {twin}), and "
                f"of {kl[layer]:.2f} after the seam (layer {layer}); lens losses {model['lens']['loss'][twin]:.2f} and "
                f"{model['lens']['loss'][layer]:.2f}."
            )
    return said


def _gradients(model: Model) -> list[str]:
    norms = model["gradients"][ALL]
    high = max(range(len(norms)), key=lambda i: norms[i])
    said = [f"the largest gradient is that of layer {high} ({norms[high]:.3g}; median {statistics.median(norms):.3g})."]
    new, others = _parts(model)
    if (a := _mean(norms, new)) is not None and (b := _mean(norms, others)):
        said.append(f"new layers have {a / b:.2f} times the mean gradient norm of the others.")
    return said


def _weights(model: Model) -> list[str]:
    said = []
    if relative := model["moved"].get("relative", {}).get(ALL):
        new, others = _parts(model)
        if not any(relative):
            said.append("no layer has moved at all from its start.")
        else:
            high = max(range(len(relative)), key=lambda i: relative[i] or 0)
            said.append(f"layer {high} moved most, by {100 * relative[high]:.3g} % of its norm.")
            means = [("new layers", _mean(relative, new)), ("the others", _mean(relative, others))]
            said.append(" and ".join(f"{k} {100 * v:.3g} %" for k, v in means if v is not None) + " on average.")
    if not model["twins"]["pairs"]:
        return [*said, "it has no twins: no two layers copied the same one."]
    distance, cosine = model["twins"]["relative"][ALL], model["twins"]["cosine"][ALL]
    if not any(distance):
        return [*said, f"its {len(distance)} pairs of twins are equal, number by number."]
    pair = max(range(len(distance)), key=lambda k: distance[k] or 0)
    return [
        *said,
        f"twins are {100 * statistics.fmean(d or 0 for d in distance):.3g} % of their norm apart on average, at most "
        f"{100 * distance[pair]:.3g} % (layers {model['twins']['pairs'][pair]}), with cosines of "
        f"{min(c for c in cosine if c is not None):.6f} or more.",
    ]


def _ablations(model: Model) -> list[str]:
    said = []
    for what, chosen in (("new", True), ("other", False)):
        found = [one for one in model["without"] if one["new"] == chosen]
        if not found:
            continue
        ordered = sorted(found, key=lambda one: one["difference"])
        better = [one["layer"] for one in found if one["difference"] < -_SURE * (one["error"] or 0)]
        middle = statistics.median(one["difference"] for one in found)
        said.append(
            f"without one {what} layer the loss changes by {_signed(ordered[0])} (layer {ordered[0]['layer']}) to "
            f"{_signed(ordered[-1])} (layer {ordered[-1]['layer']}), median {middle:+.4f}; it falls by more than two "
            f"standard errors (some do by chance) for {len(better)} of {len(found)}: {layer_list(better) or 'none'}."
        )
    for block in model["blocks"][:_SHOWN]:
        first, second = layer_list(block["first"]), layer_list(block["second"])
        said.append(
            f"with layers {first} and {second}, their twins, exchanged the loss changes by "
            f"{_signed(block['exchanged'])}; with the first visit's layers at both places by "
            f"{_signed(block['first_twice'])}, with the second's by {_signed(block['second_twice'])}."
        )
    if len(model["blocks"]) > _SHOWN:
        said.append(f"{len(model['blocks']) - _SHOWN} more repeated blocks are in seam.json.")
    return said


SECTIONS: dict[str, tuple[str, Callable[[Model], list[str]]]] = {
    "stream": ("The residual stream", _stream),
    "lens": ("The logit lens", _lens),
    "gradients": ("Gradients", _gradients),
    "weights": ("Weights", _weights),
    "ablations": ("Without a layer, and with visits exchanged", _ablations),
}

DEFINITIONS = {
    "layer": "counted from 0; lists of stream.norm, stream.norm_median and lens have one more entry, the last layer's "
    "output",
    "stream.norm": "L2 norm of the residual stream at a layer's input, mean over tokens; norm_median: median",
    "stream.cosine": "of a layer's input and output, mean over tokens",
    "stream.attention": "norm of what attention adds, over the norm of its input, mean over tokens",
    "stream.mlp": "norm of what the MLP adds, over the norm of the stream between attention and MLP, mean over tokens",
    "lens": "the final norm and output projection applied to a layer's input: kl is KL(final || lens) in nats, loss "
    "in nats, agreement the share of tokens with the last layer's likeliest token",
    "gradients": "L2 norm of the gradient of the mean loss over all rows, by array, by group, and for a layer's input "
    "(stream)",
    "seams": "norm_ratio: median norm of what enters the layer after the seam, over that at its twin; input_cosine: "
    "of both, mean over tokens",
    "moved": "distance |W - W0| and relative |W - W0| / |W0|, W0 being the weights that the layer map gave the layer "
    "(rounded to the model's dtype); null where W0 is 0",
    "twins": "two layers with the same source and no third between: relative |a - b| / sqrt((|a|^2 + |b|^2) / 2), and "
    "the cosine, of the weights as vectors",
    "without": "the loss without one layer; difference and its standard error over rows are paired with the model's",
    "exchanged_twins": "the loss with one pair of twins exchanged",
    "blocks": "a block that stands twice: with both visits exchanged, with the first visit's layers at both places, "
    "and with the second's",
}
