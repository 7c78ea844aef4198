"""Chat templates: messages to text, with the environment that transformers gives them, and the spans of answers."""

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from solar_jax.checkpoints.companions import TEMPLATE, TOKENIZER_CONFIG, template_text
from solar_jax.data.chat.formats import Message
from solar_jax.errors import UserError

Span = tuple[int, int]  # half-open, in characters

# Templates that need no file. SOLAR 10.7B-Instruct's writes no special tokens, and nothing after an answer.
NAMED = {
    "solar": (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ '### Assistant:\\n' + m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '### User:\\n' + m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'system' %}"
        "{% if m['content'] %}{{ '### System:\\n' + m['content'] + '\\n\\n' }}{% endif %}"
        "{% else %}{{ raise_exception('a message is of the role ' + m['role']) }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Prompt and completion end to end, as plain text.
    "none": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
_OPEN, _CLOSE = "\ue0f0\ue0f1", "\ue0f1\ue0f0"  # private characters around what {% generation %} encloses
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template with everything that its output depends on."""

    name: str  # where it comes from, for messages
    text: str  # Jinja
    specials: tuple[tuple[str, str], ...] = ()  # variables such as bos_token
    date: str = ""  # ISO date and time that strftime_now formats; "": the present

    @property
    def needs_date(self) -> bool:
        """True if the output depends on the day."""
        return "strftime_now" in self.text

    def render(
        self, messages: Iterable[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None,
        **kwargs: Any,
    ) -> str:  # fmt: skip
        """The text of a conversation.

        Raises:
          UserError: the template is broken, or refuses these messages.
        """
        return self._rendered(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)[0]

    def render_with_spans(
        self, messages: Iterable[Message], *, tools: list[Any] | None = None, **kwargs: Any
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template encloses in {% generation %}; none if it does not use that."""
        return self._rendered(messages, add_generation_prompt=False, tools=tools, **kwargs)

    def _rendered(self, messages: Iterable[Message], **how: Any) -> tuple[str, list[Span]]:
        try:
            compiled = _compiled(self.text, self.date)
            marked = compiled.render(messages=list(map(_with_reasoning, messages)), **(dict(self.specials) | how))
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"{self.name}: the chat template fails: {' '.join(str(e).split()).rstrip('.')}.") from e
        spans: list[Span] = []
        parts, length, begin = [], 0, 0
        for part in re.split(f"({_OPEN}|{_CLOSE})", marked):
            if part == _OPEN:
                begin = length
            elif part == _CLOSE:
                spans.append((begin, length))
            else:
                parts.append(part)
                length += len(part)
        return "".join(parts), spans


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning has the names that templates read; "weight" is ours, not theirs."""
    message = {key: value for key, value in message.items() if key != "weight"}
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} ... {% endgeneration %}, which transformers gave templates."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own attribute)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Dict:
    """A dict constructor without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")


@functools.lru_cache(maxsize=8)
def _compiled(text: str, date: str) -> jinja2.Template:
    """A template compiled in a sandbox with the filters and functions that transformers documents.

    trim_blocks, lstrip_blocks, break and continue; tojson escapes no HTML; raise_exception and strftime_now.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return (datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()).strftime(form)

    environment.filters["tojson"] = tojson
    functions: dict[str, Any] = environment.globals
    functions |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment.from_string(text)


def special_tokens(companions: Mapping[str, bytes], where: str) -> dict[str, str]:
    """The special tokens of tokenizer_config.json by name, such as bos_token."""
    return dict(_specials(_object(companions, "tokenizer_config.json", where)))


def load_template(chosen: str, companions: Mapping[str, bytes], where: str, date: str = "") -> Template:
    """The template that config.data.template names.

    Args:
      chosen: "tokenizer", a name of `NAMED`, or a file.
      companions: files beside the model's weights.
      where: the model, for messages.
      date: see `Template`.

    Raises:
      UserError: there is none, or the file cannot be read.
    """
    config = _object(companions, "tokenizer_config.json", where)
    specials = _specials(config)
    if chosen in NAMED:
        return Template(chosen, NAMED[chosen], specials, date)
    if chosen != "tokenizer":
        if not os.path.isfile(chosen):
            raise UserError(
                f"config.data.template must be tokenizer, {', '.join(NAMED)} or a file, found {chosen!r}, which does "
                "not exist."
            )
        with open(chosen, encoding="utf-8") as f:
            return Template(chosen, f.read(), specials, date)
    if (found := template_text(companions)) is None:
        raise UserError(
            f"{where}: the tokenizer has no chat template; name one with config.data.template: "
            f"{', '.join(NAMED)}, or a file."
        )
    return Template(f"{where}: {TEMPLATE if TEMPLATE in companions else TOKENIZER_CONFIG}", found, specials, date)


def _object(companions: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(companions.get(name, b"{}"))
    except ValueError as e:
        raise UserError(f"{where}: {name} is not JSON: {e}.") from e
    return found if isinstance(found, dict) else {}


def _specials(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The special tokens of tokenizer_config.json by name, in both forms in which it may hold them."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return tuple(sorted(found.items()))
