"""README.md of a Hugging Face folder: front matter for the hub, the layer map, losses, and how to load the model."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import BASE_CARD
from solar_jax.checkpoints.lineage import public
from solar_jax.growth.picture import picture
from solar_jax.model.shapes import parameter_count

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def model_card(
    c: Checkpoint, name: str, made_by: str, losses: Mapping[str, float] | None = None, numbers: str = ""
) -> str:
    """Writes the card of a checkpoint.

    Args:
      c: the checkpoint, usually a view.
      name: of the model: its folder's, or its repository's.
      made_by: "upscale", "convert", "merge" or "train".
      losses: held-out loss in nats per token by model, where it was measured.
      numbers: Markdown of other results.
    """
    base, license_name = base_model(c), _license(c)
    record = _origin(c)
    grown, trained = not c.layer_map.is_identity or record.get("operator", "identity") != "identity", made_by == "train"
    operator = c.layer_map.operator if not c.layer_map.is_identity else record.get("operator", "identity")
    front = ["---"]
    front += [f"base_model: {base}"] if base else []
    front += [f"license: {license_name}"] if license_name else []
    front += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- solar_jax"]
    front += ["- depth-up-scaling"] if grown else []
    front += ["- merge"] if c.source.recipe else []
    front += ["---", "", f"# {name}", ""]
    source = (record.get("source") or {}).get("where") or public(c.source.where)
    what = f"{base or source}, {'made deeper' if grown else 'converted'} with solar_jax"
    what += f" by `{operator}`" if grown else ""
    what += ", then trained." if trained else "; not trained since." if grown else "."
    if c.source.recipe:
        what = f"{c.source.where}, merged with solar_jax."
    size = (
        f"{c.cfg.num_hidden_layers} layers, {parameter_count(c.cfg):,} parameters, {c.common_dtype or 'mixed dtypes'}."
    )
    body = [what, size, "", _LOAD.format(name=name), ""]
    if not c.layer_map.is_identity:
        body += ["## Layer map", "", "```"]
        body += [picture(c.layer_map, parameter_count(c.source.cfg), parameter_count(c.cfg)), "```", ""]
    elif grown and "source_layers" in record:
        body += ["## Layer map", "", f"Source layer of each layer: {record['source_layers']}", ""]
    if numbers:
        body += ["## Stages", "", numbers, ""]
    if losses:
        body += ["## Held-out loss", "", "| model | nats per token |", "|---|---|"]
        body += [f"| {model} | {loss:.4f} |" for model, loss in losses.items()] + [""]
    body += ["`lineage.json` has the source with its hashes, the command and the versions of the programs."]
    body += [f"The card of the base is in `{BASE_CARD}`."] if BASE_CARD in c.companions else []
    if not license_name:
        body += ["", "The source states no license; add the base model's to this card before you share the model."]
    return "\n".join(front + body) + "\n"


def base_model(c: Checkpoint) -> str | None:
    """Returns the hub id of the model that everything began with, if it is known."""
    if repository := re.search(r"models--(.+?)--(.+?)/", c.source.where):
        return f"{repository[1]}/{repository[2]}"
    oldest = _lineage(c)
    while oldest and oldest.get("parents"):
        oldest = oldest["parents"][0]
    for found in ((oldest or {}).get("base_model"), c.hf_config.get("_name_or_path")):
        # A local folder's name may look like an id, but then it usually exists.
        if isinstance(found, str) and _ID.fullmatch(found) and not pathlib.Path(found).exists():
            return found
    return None


def _origin(c: Checkpoint) -> dict[str, Any]:
    """Returns the lineage of the checkpoint or its nearest parent that was grown; {} if there is none."""
    record = _lineage(c) or {}
    while record and record.get("operator") == "identity" and record.get("parents"):
        record = record["parents"][0]
    return record


def _lineage(c: Checkpoint) -> dict[str, Any] | None:
    """Returns the lineage of the checkpoint's source, or of the first input of a merge."""
    return (c.source.merged_from or (c.source,))[0].lineage


def _license(c: Checkpoint) -> str | None:
    """Returns the license that the front matter of the base's card names."""
    text = c.companions.get(BASE_CARD, b"").decode(errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
