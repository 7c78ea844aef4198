"""Talk to a model, or have it answer a prompt or a file of prompts.

    python -m solar_jax.generate --model SRC --prompt "..." [--max_new_tokens 256] [--temperature 0]
    python -m solar_jax.generate --model SRC --prompts FILE.jsonl --out FILE.jsonl
    python -m solar_jax.generate --model SRC --chat

A line of FILE has `prompt`, text, or `messages`, which the model's chat template writes. Lines are answered side by
side (--rows); the same command goes on where it was killed. In a chat an empty line starts a new conversation.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import DTYPES
from solar_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("model", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_string("prompt", None, "Text to go on from.")
    flags.DEFINE_string("prompts", None, "JSONL file of prompts; needs --out.")
    flags.DEFINE_string("out", None, "JSONL file of answers.")
    flags.DEFINE_bool("chat", False, "Talk to the model; ends with the input.")
    flags.DEFINE_string("system", None, "System message of a chat.")
    flags.DEFINE_integer("max_new_tokens", 256, "Most tokens of an answer.")
    flags.DEFINE_float("temperature", 0.0, "0: always the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from so many tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens of this probability.")
    flags.DEFINE_float("min_p", 0.0, "Draw from tokens of at least this share of the highest probability.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Divides the score of tokens that occurred.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of weights, activations and cache.")
    flags.DEFINE_enum("quantize", "", ("", "int8"), "Dtype of the projections' weights, if not the others'.")
    flags.DEFINE_integer("rows", 8, "Prompts of a file that are answered side by side.")
    flags.DEFINE_bool("compilation_cache", True, "Reuse compiled programs at the next start.")
    flags.DEFINE_integer("context", 0, "Most tokens of a prompt with its answer; the model's own if 0.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.model or (f.prompt is not None) + (f.prompts is not None) + f.chat != 1:
        raise UserError("generate needs --model SRC and one of --prompt TEXT, --prompts FILE and --chat.")
    if (f.prompts is None) != (f.out is None):
        raise UserError("--prompts FILE and --out FILE go together.")
    if f.system is not None and not f.chat:
        raise UserError("--system goes with --chat; a line of --prompts has its own messages.")
    for name, value in (("max_new_tokens", f.max_new_tokens), ("rows", f.rows)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}.")
    if f.prompts and not pathlib.Path(f.prompts).is_file():
        raise UserError(f"{f.prompts}: no such file.")
    check_local(f.model)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.engine import Answer, Engine, Request
from solar_jax.decoding.model import Loaded, load_model
from solar_jax.decoding.sampling import Sampling
from solar_jax.decoding.stops import check_stops
from solar_jax.hardware import compilation
from solar_jax.monitoring.metrics import JsonLines
from solar_jax.parallel import processes
from solar_jax.storage.paths import write_file


@dataclasses.dataclass(frozen=True)
class How:
    """How prompts are answered."""

    max_new_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stops: tuple[str, ...] = ()

    def request(self, tokens: Sequence[int]) -> Request:
        return Request(tuple(tokens), self.max_new_tokens, self.sampling, self.stops)


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    compilation.use_cache(f.compilation_cache)
    sampling = Sampling(f.temperature, f.top_k, f.top_p, f.min_p, f.repetition_penalty, f.seed)
    how = How(f.max_new_tokens, sampling, check_stops(list(f.stop)))
    model = load_model(open_checkpoint(f.model), f.dtype, quantize=f.quantize)
    engine = model.engine(rows=f.rows if f.prompts else 1, context=f.context)
    if f.prompt is not None:
        _print_stream(engine, how.request(model.encode(f.prompt)))
    elif f.chat:
        chat(model, engine, how, f.system)
    else:
        answer_file(model, engine, how, pathlib.Path(f.prompts), pathlib.Path(f.out))


def _print_stream(engine: Engine, request: Request) -> Answer:
    """Prints an answer as it is generated."""
    engine.submit(request)
    while True:
        for piece in engine.step():
            print(piece.text, end="", flush=True)
            if piece.answer is not None:
                print(flush=True)
                return piece.answer


def chat(model: Loaded, engine: Engine, how: How, system: str | None) -> None:
    """Answers what is typed, turn by turn.

    Raises:
      UserError: the model has no chat template, or the conversation exceeds the context.
    """
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    model.encode_chat([*start, {"role": "user", "content": ""}])  # is there a template
    print("an empty line starts a new conversation, Ctrl-D ends", flush=True)
    messages = list(start)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            messages = list(start)
            print("new conversation", flush=True)
            continue
        messages.append({"role": "user", "content": text})
        answer = _print_stream(engine, how.request(model.encode_chat(messages)))
        messages.append({"role": "assistant", "content": answer.text})


def answer_file(model: Loaded, engine: Engine, how: How, file: pathlib.Path, out: pathlib.Path) -> None:
    """Answers the lines of a file that are not answered yet; `out` appears once all are.

    Raises:
      UserError: a line is no prompt, or cannot be answered; or `out` is that of other prompts.
    """
    lines = list(_read(file))
    requests = [how.request(_tokens(model, record, f"{file}:{i + 1}")) for i, record in enumerate(lines)]
    for i, request in enumerate(requests):
        try:
            engine.check(request)
        except UserError as e:
            raise UserError(f"{file}:{i + 1}: {e}") from e
    if out.exists():
        raise UserError(f"{out}: already exists.")
    kept = JsonLines(out.with_name(f".{out.name}.partial"))
    known = {r["line"]: r for r in kept.read() if r["line"] < len(lines) and r["request"] == _key(requests[r["line"]])}
    left = [i for i in range(len(lines)) if i not in known]
    print(f"{len(lines)} prompts, {len(left)} of them to be answered", flush=True)
    for place, answer in engine.answers(requests[i] for i in left):
        line = left[place]
        known[line] = {"line": line, "request": _key(requests[line]), "text": answer.text, "finish": answer.finish,
                       "tokens": len(answer.tokens)}  # fmt: skip
        kept.append(known[line])
        kept.flush()
    made = [lines[i] | {key: known[i][key] for key in ("text", "finish", "tokens")} for i in range(len(lines))]
    write_file(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made).encode())
    out.with_name(f".{out.name}.partial").unlink(missing_ok=True)
    print(f"{out}: {len(made)} answers")


def _key(request: Request) -> str:
    return repr(request)


def _read(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    for i, line in enumerate(file.read_text().splitlines()):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise UserError(f"{file}:{i + 1}: is not JSON: {e}.") from e
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise UserError(f"{file}:{i + 1}: must be an object with either 'prompt' or 'messages'.")
        yield record


def _tokens(model: Loaded, record: dict[str, Any], where: str) -> list[int]:
    if "messages" in record:
        return model.encode_chat(record["messages"])
    if not isinstance(record["prompt"], str) or not record["prompt"]:
        raise UserError(f"{where}: prompt must be text, found {record['prompt']!r}.")
    return model.encode(record["prompt"])


if __name__ == "__main__":
    command.start(main)
