"""A growth plan drawn in text: which source layer stands where, and what the seams are."""

from solar_jax.growth.operators import GrowthPlan

_MOST_BARS = 12  # with more runs than this a bar for each would hide the pattern; then a grid of numbers is drawn


def _bar(plan: GrowthPlan, start: int, stop: int) -> str:
    """One character a source layer: where the run's layers come from, `o` a zeroed copy."""
    cells = ["·"] * plan.base_layers
    for i in range(start, stop):
        cells[plan.source[i]] = "o" if plan.scale[i] == 0 else "█"
    return "".join(cells)


def _grid(plan: GrowthPlan) -> list[str]:
    """Sixteen output layers a line, each as its source layer: `*` a new copy, `o` a zeroed one, `a/b` a mean."""
    cells = []
    for source, partner, scale, new in zip(plan.source, plan.partner, plan.scale, plan.new, strict=True):
        mark = "o" if scale == 0 else "*" if new else " "
        cells.append(f"{source}/{partner}{mark}" if partner != source else f"{source}{mark}")
    width = max(map(len, cells)) + 1
    return [
        f"  {row:>4} | " + "".join(c.rjust(width) for c in cells[row : row + 16]) for row in range(0, plan.layers, 16)
    ]


def picture(plan: GrowthPlan, base_parameters: int, parameters: int) -> str:
    """The plan for a person to check: layers and parameters before and after, the map, distances, seams."""
    lines = [
        f"{plan.operator}: {plan.base_layers} -> {plan.layers} layers, "
        f"{base_parameters:,} -> {parameters:,} parameters ({parameters / base_parameters:.2f}x)"
    ]
    runs = plan.runs()
    if len(runs) <= _MOST_BARS:
        ruler = "source layers".center(max(plan.base_layers - 3 - len(str(plan.base_layers - 1)), 13))
        lines.append(f"  output   <- source        0 {ruler} {plan.base_layers - 1}")
        for start, stop in runs:
            lines.append(
                f"  {start:>3}..{stop - 1:<3} <- {plan.source[start]:>3}..{plan.source[stop - 1]:<3}    "
                f"  {_bar(plan, start, stop)}"
            )
    else:
        lines += _grid(plan)
    distances = plan.distances
    far = [i for i in plan.seams if distances[i] != 1]
    if not plan.seams:
        lines.append("  no seam: every layer follows its own predecessor")
    elif len(plan.seams) <= _MOST_BARS:
        for i in plan.seams:
            lines.append(
                f"  seam {i}|{i + 1}: source {plan.source[i]} -> {plan.source[i + 1]}, layer distance {distances[i]}"
            )
    else:
        lines.append(
            f"  {len(plan.seams)} seams, layer distance {min(distances)} to {max(distances)}, "
            f"{len(far)} of {len(distances)} neighbours not at distance 1"
        )
    zeroed = sum(s == 0 for s in plan.scale)
    means = sum(a != b for a, b in zip(plan.source, plan.partner, strict=True))
    lines.append(
        f"  {sum(plan.new)} new layers"
        + (f", {zeroed} with o_proj and down_proj zeroed" if zeroed else "")
        + (f", {means} means of two neighbours" if means else "")
    )
    return "\n".join(lines)


def layer_list(layers: list[int]) -> str:
    """Layer numbers as ranges, e.g. "0-23, 30"."""
    parts, i = [], 0
    while i < len(layers):
        j = i
        while j + 1 < len(layers) and layers[j + 1] == layers[j] + 1:
            j += 1
        parts.append(f"{layers[i]}-{layers[j]}" if j > i else f"{layers[i]}")
        i = j + 1
    return ", ".join(parts)
