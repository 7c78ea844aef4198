"""Compares tokens and labels of conversations and pairs with TRL's prepared datasets, on real records.

    python scripts/bench/records.py FILE... [--records 300] [--template TEMPLATE]

Records of every form are read by this package, turned into TRL's own form (prompt and completion, or prompt, chosen and
rejected, as messages), and prepared by TRL's trainers with SmolLM2's tokenizer. Every token and label must be equal;
what this package leaves out by a rule is counted, by reason, since TRL keeps it or drops it without a count.
"""

import argparse
import collections
import itertools
import os
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import transformers

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.config import DataConfig
from solar_jax.data.chat.encoding import LeftOut, Rules, load_rules
from solar_jax.data.chat.formats import CONVERSATIONS, Pair, read_record
from solar_jax.data.files import find_files
from solar_jax.data.readers import WHOLE, read_documents
from solar_jax.data.sources import Document
from solar_jax.errors import UserError

LONGEST = 1 << 20  # tokens; nothing is cut here


def form_of(record: dict[str, Any]) -> str:
    """The kind of a record."""
    try:
        read_record(record, "", "pairs")
        return "pairs"
    except UserError:
        return "conversations"


def of_trl(kind: str, records: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    common = {"output_dir": tempfile.mkdtemp(), "report_to": [], "bf16": False, "use_cpu": True, "max_length": None}
    model, data = transformers.LlamaForCausalLM(config), datasets.Dataset.from_list(records)
    if kind == "conversations":
        made = SFTTrainer(model, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    else:
        other = transformers.LlamaForCausalLM(config)
        args = DPOConfig(**common)
        made = DPOTrainer(model, ref_model=other, args=args, train_dataset=data, processing_class=tokenizer)
    return list(made.train_dataset)


def compare(file: str, count: int, rules: dict[str, Rules], tokenizer: Any) -> None:
    (found,) = find_files(file).files
    records = [record for _, record in itertools.islice(read_documents(found, WHOLE), count)]
    kind, left_out = form_of(records[0]), collections.Counter()
    kept, theirs = [], []
    for i, record in enumerate(records):
        read = read_record(record, f"{file}:{i}", kind)
        try:
            kept.append(rules[kind].encode(Document(f"{file}:{i}", "", record), LONGEST))
        except LeftOut as e:
            left_out[str(e)] += 1
            continue
        if isinstance(read, Pair):
            prompt, n = read.chosen.messages[: read.chosen.prompt], read.chosen.prompt
            theirs.append(
                {"prompt": prompt, "chosen": read.chosen.messages[n:], "rejected": read.rejected.messages[n:]}
            )
        else:
            n = len(read.messages) - 1
            theirs.append({"prompt": read.messages[:n], "completion": read.messages[n:]})
    wrong = 0
    for ours, row in zip(kept, of_trl(kind, theirs, tokenizer), strict=True):
        if kind == "conversations":
            labels = [int(t) if m else -100 for t, m in zip(ours[0].tokens, ours[0].trained, strict=True)]
            wrong += ours[0].tokens.tolist() != row["input_ids"] or labels != row["labels"]
        else:
            for side, answer in zip(ours, (row["chosen_ids"], row["rejected_ids"]), strict=True):
                wrong += side.tokens.tolist() != row["prompt_ids"] + answer
                wrong += side.tokens[side.trained].tolist() != answer
    said = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    print(f"{os.path.basename(file)}: {len(kept)} {kind}, {wrong} differ" + (f"; left out: {said}" if said else ""))
    if wrong:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--template", default="tokenizer")
    args = parser.parse_args()
    c = open_checkpoint("smollm2")
    tokenizer, folder = load_tokenizer(c), tempfile.mkdtemp()
    for name, content in c.companions.items():
        with open(f"{folder}/{name}", "wb") as f:
            f.write(content)
    rules = {}
    for kind in ("conversations", "pairs"):
        cfg = DataConfig(format=kind, template=args.template)
        made = load_rules(cfg, c.companions, "smollm2", tokenizer, 2)
        assert made is not None
        rules[kind] = made
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = rules["pairs"].template.text
    print(f"forms: {', '.join(CONVERSATIONS)}; the last turn's answer is TRL's completion")
    for file in args.files:
        compare(file, args.records, rules, theirs)


if __name__ == "__main__":
    main()
