"""Recipes as people publish them, at tiny size: what mergekit makes of each, or refused by its method's name."""

import pathlib

import pytest

from solar_jax.errors import UserError
from tests.merging.oracle import both, ours, tensors, write_models

pytestmark = pytest.mark.slow  # mergekit imports for ten seconds

# The shapes of mergekit's examples and of model cards; A, B, C, BASE are models of four layers, OLD a base.
GRADIENT_SLERP = """
slices:
  - sources:
      - model: A
        layer_range: [0, 4]
      - model: B
        layer_range: [0, 4]
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
RECIPES = {
    "gradient slerp": GRADIENT_SLERP,
    "slerp with models and embeddings apart": """
models:
  - model: A
  - model: B
merge_method: slerp
base_model: B
dtype: bfloat16
parameters:
  t:
    - filter: lm_head
      value: [0.55]
    - filter: embed_tokens
      value: [0.7]
    - filter: layernorm
      value: [0.65, 0.45]
    - value: [0, 0.25, 0.5, 0.25, 0]
""",
    "linear": """
models:
  - model: A
    parameters:
      weight: 1.0
  - model: B
    parameters:
      weight: 0.3
  - model: C
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    "linear with stray keys": """
name: a-linear-merge
models:
  - {model: A, parameters: {weight: 1}}
  - {model: B, parameters: {weight: 1, density: 0.5}}
merge_method: linear
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer_source: base
base_model: A
""",
    "linear of layers with a gradient": """
slices:
  - sources:
      - {model: A, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: B, layer_range: [0, 2], parameters: {weight: [0.8, 0.2]}}
  - sources:
      - {model: A, layer_range: [2, 4], parameters: {weight: 0.5}}
      - {model: C, layer_range: [1, 3], parameters: {weight: 0.5}}
merge_method: linear
dtype: bfloat16
""",
    "ties with gradients and filters": """
models:
  - model: A
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: BASE
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties in float32": """
models:
  - model: BASE
    # no parameters necessary for base model
  - {model: A, parameters: {density: 0.5, weight: 0.5}}
  - {model: B, parameters: {density: 0.5, weight: 0.3}}
merge_method: ties
base_model: BASE
parameters: {normalize: true}
dtype: float32
out_dtype: bfloat16
""",
    "dare_ties": """
models:
  - model: BASE
  - {model: A, parameters: {density: 0.53, weight: 0.4}}
  - {model: B, parameters: {density: 0.53, weight: 0.3}}
  - {model: C, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: BASE
parameters: {int8_mask: true}
dtype: bfloat16
random_seed: 0
""",
    "dare_linear": """
models:
  - {model: A, parameters: {density: 0.7, weight: 0.5}}
  - {model: B, parameters: {density: 0.7, weight: 0.5}}
merge_method: dare_linear
base_model: BASE
parameters: {int8_mask: 1.0, normalize: 0.0}
dtype: bfloat16
""",
    "task_arithmetic": """
base_model: BASE
dtype: float32
out_dtype: float16
merge_method: task_arithmetic
parameters: {lambda: 0.9, normalize: true}
models:
  - {model: A, parameters: {weight: "8e-1"}}
  - {model: B, parameters: {weight: -0.3}}
""",
    "model_stock": """
models:
  - model: A
  - model: B
  - model: C
merge_method: model_stock
base_model: BASE
parameters: {filter_wise: false}
dtype: float32
""",
    "nuslerp": """
models:
  - {model: A, parameters: {weight: 0.55}}
  - {model: B, parameters: {weight: 0.45}}
merge_method: nuslerp
base_model: BASE
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
dtype: float32
""",
    "depth up-scaling": """
slices:
  - sources:
      - {model: A, layer_range: [0, 3]}
  - sources:
      - {model: A, layer_range: [1, 4]}
merge_method: passthrough
dtype: bfloat16
""",
    "interleaved ranges of two models": """
slices:
  - sources: [{model: A, layer_range: [0, 2]}]
  - sources: [{model: B, layer_range: [1, 2]}]
  - sources: [{model: A, layer_range: [1, 3]}]
  - sources: [{model: B, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float16
""",
    "block expansion": """
slices:
  - sources: [{model: A, layer_range: [0, 2]}]
  - sources:
      - model: A
        layer_range: [1, 2]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: A, layer_range: [2, 4]}]
merge_method: passthrough
dtype: bfloat16
""",
    "pruning layers": """
slices:
- sources:
  - {layer_range: [0, 1], model: A}
- sources:
  - {layer_range: [3, 4], model: A}
merge_method: passthrough
""",
    "modules": """
modules:
  default:
    slices:
      - sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]
        parameters: {t: 0.25}
base_model: A
merge_method: slerp
dtype: float32
""",
    "written by a program": """
base_model:
  model:
    path: BASE
dtype: bfloat16
merge_method: task_arithmetic
parameters: {int8_mask: 1.0, normalize: 0.0}
slices:
- sources:
  - layer_range: [0, 4]
    model: {model: {path: A}}
    parameters: {weight: 0.62}
  - layer_range: [0, 4]
    model: {model: {path: B}}
    parameters: {weight: [{filter: self_attn, value: 0.1}, {filter: mlp, value: 0.4}, {value: 0.3}]}
  - layer_range: [0, 4]
    model: {model: {path: BASE}}
tokenizer_source: base
""",
    "union of tokenizers": """
models:
  - {model: A, parameters: {weight: 0.5}}
  - {model: C, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: "{% for m in messages %}{{ m['content'] }}{% endfor %}"
""",
}
REFUSED = {
    "breadcrumbs": "{merge_method: breadcrumbs, base_model: BASE, models: [{model: A, parameters: {weight: 1}}]}",
    "della": "{merge_method: della, base_model: BASE, models: [{model: A, parameters: {weight: 1, epsilon: 0.1}}]}",
    "karcher": "{merge_method: karcher, models: [{model: A}, {model: B}], parameters: {max_iter: 10}}",
    "sce": "{merge_method: sce, base_model: BASE, models: [{model: A}, {model: B}], parameters: {select_topk: 0.1}}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    found = write_models(tmp_path_factory.mktemp("models"), "float32", vocab_size=259)
    return {name.upper(): folder for name, folder in found.items()}


def filled(text: str, folders: dict[str, str]) -> str:
    for name in ("BASE", "A", "B", "C"):
        for before, after in ((": ", "\n"), (": ", ","), (": ", "}")):
            text = text.replace(f"{before}{name}{after}", f"{before}{folders[name]}{after}")
    return text


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_gives_mergekits_tensors(folders, name, tmp_path):
    a, b = both(filled(RECIPES[name], folders), tmp_path)
    if name.startswith("dare"):  # other random numbers: the same size of change
        base = tensors(pathlib.Path(folders["BASE"]))
        changes = [sum(float((x[key] - base[key]).abs().sum()) for key in base) for x in (a, b)]
        assert changes[0] == pytest.approx(changes[1], rel=0.02)
        return
    for key, x in a.items():
        difference = (x.float() - b[key].float()).abs()[:259]  # padding, a mean, is in test_vocabulary
        if name == "ties with gradients and filters":  # which of equal magnitudes are kept is open: many in norms
            assert (difference > 0).float().mean() < (0.03 if difference.ndim > 1 else 0.3), key
        elif name in ("model_stock", "nuslerp"):
            assert difference.max() < 1e-6, key
        else:
            assert not difference.any(), key


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_there_is_refused_by_name(folders, name, tmp_path):
    with pytest.raises(UserError, match=f"merge_method must be one of .*, found '{name}'"):
        ours(filled(REFUSED[name], folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()
