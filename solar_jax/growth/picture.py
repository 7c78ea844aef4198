"""A growth layer map drawn as text: the source of each output layer, and the seams."""

from solar_jax.growth.operators import LayerMap

_MIXES = {"mean": "means of two neighbours", "fit": "fitted to two neighbours"}
_MOST_BARS = 12  # with more runs than this, bars would hide the pattern and a grid of numbers is drawn


def _bar(layer_map: LayerMap, start: int, stop: int) -> str:
    """One character per source layer, marking the sources of the run's layers; `o` is a zeroed copy."""
    cells = ["·"] * layer_map.base_layers
    for i in range(start, stop):
        cells[layer_map.source[i]] = "o" if layer_map.scale[i] == 0 else "█"
    return "".join(cells)


def _grid(layer_map: LayerMap) -> list[str]:
    """Sixteen output layers per line, each as its source layer: `*` a new copy, `o` a zeroed one, `a/b` a mean."""
    cells = []
    for source, partner, scale, new in zip(
        layer_map.source, layer_map.partner, layer_map.scale, layer_map.new, strict=True
    ):
        mark = "o" if scale == 0 else "*" if new else " "
        cells.append(f"{source}/{partner}{mark}" if partner != source else f"{source}{mark}")
    width = max(map(len, cells)) + 1
    return [
        f"  {row:>4} | " + "".join(c.rjust(width) for c in cells[row : row + 16])
        for row in range(0, layer_map.layers, 16)
    ]


def picture(layer_map: LayerMap, base_parameters: int, parameters: int) -> str:
    """The layer map for review: layers and parameters before and after, the map, distances, seams."""
    lines = [
        f"{layer_map.operator}: {layer_map.base_layers} -> {layer_map.layers} layers, "
        f"{base_parameters:,} -> {parameters:,} parameters ({parameters / base_parameters:.2f}x)"
    ]
    runs = layer_map.runs()
    if len(runs) <= _MOST_BARS:
        ruler = "source layers".center(max(layer_map.base_layers - 3 - len(str(layer_map.base_layers - 1)), 13))
        lines.append(f"  output   <- source        0 {ruler} {layer_map.base_layers - 1}")
        for start, stop in runs:
            lines.append(
                f"  {start:>3}..{stop - 1:<3} <- {layer_map.source[start]:>3}..{layer_map.source[stop - 1]:<3}    "
                f"  {_bar(layer_map, start, stop)}"
            )
    else:
        lines += _grid(layer_map)
    distances = layer_map.distances
    far = [i for i in layer_map.seams if distances[i] != 1]
    if not layer_map.seams:
        lines.append("  no seam: every layer follows its own predecessor")
    elif len(layer_map.seams) <= _MOST_BARS:
        for i in layer_map.seams:
            lines.append(
                f"  seam {i}|{i + 1}: source {layer_map.source[i]} -> {layer_map.source[i + 1]}, "
                f"layer distance {distances[i]}"
            )
    else:
        lines.append(
            f"  {len(layer_map.seams)} seams, layer distance {min(distances)} to {max(distances)}, "
            f"{len(far)} of {len(distances)} neighbours not at distance 1"
        )
    zeroed = sum(s == 0 for s in layer_map.scale)
    means = sum(a != b for a, b in zip(layer_map.source, layer_map.partner, strict=True))
    lines.append(
        f"  {sum(layer_map.new)} new layers"
        + (f", {zeroed} with o_proj and down_proj zeroed" if zeroed else "")
        + (f", {means} {_MIXES[layer_map.mix]}" if means else "")
        + (f", {sum(layer_map.noise)} with other matrices of noise" if any(layer_map.noise) else "")
    )
    partly = [i for i, scale in enumerate(layer_map.scale) if scale not in (0, 1)]
    for scale in sorted({layer_map.scale[i] for i in partly}):
        its = [i for i in partly if layer_map.scale[i] == scale]
        lines.append(f"  o_proj and down_proj scaled by {scale:g} in layers {layer_list(its)}")
    if layer_map.experts:
        lines.append(f"  each layer's MLP becomes {layer_map.experts}")
    if layer_map.tied:
        lines.append("  layers of one source share their weights in training")
    return "\n".join(lines)


def layer_list(layers: list[int]) -> str:
    """Formats layer numbers as ranges, e.g. "0-23, 30"."""
    parts, i = [], 0
    while i < len(layers):
        j = i
        while j + 1 < len(layers) and layers[j + 1] == layers[j] + 1:
            j += 1
        parts.append(f"{layers[i]}-{layers[j]}" if j > i else f"{layers[i]}")
        i = j + 1
    return ", ".join(parts)
