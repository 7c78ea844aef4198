"""Merge recipes: mergekit's YAML, read as it is, or the same from a method and weighted models."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from solar_jax.config import DTYPES
from solar_jax.errors import UserError

Settings = Mapping[str, Any]  # a parameter's name -> number, gradient or conditions, as in the YAML

# YAML keys by place; `name` is read by other programs only.
_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "random_seed", "name",
)  # fmt: skip
_MODEL = ("model", "parameters")
_SOURCE = (*_MODEL, "layer_range")
_SLICE = ("sources", "base_model", "parameters")
_MODULE = ("models", "slices", "parameters")
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_TOKEN_SOURCE = ("kind", "model", "token_id", "token")
_REFERENCE, _PATH = ("model", "lora", "override_architecture"), ("path", "revision")
_ONLY_MODULE = "default"  # mergekit's name of a language model's only module


@dataclasses.dataclass(frozen=True)
class SourceRange:
    """An input of a range of layers."""

    model: str  # SRC, or SRC+ADAPTER
    layers: tuple[int, int] | None  # half-open; None: all
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Section:
    """A range of the merged model's layers: the inputs whose layers are merged one by one."""

    sources: tuple[SourceRange, ...]
    base: str | None  # the model that differences are taken from
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenRule:
    """The embedding of a token that some model lacks, or of every model's (`force`)."""

    model: str | None  # that has it; None: zeros
    token: str | int | None = None  # there; None: the same one
    force: bool = False


@dataclasses.dataclass(frozen=True)
class VocabularyRule:
    """The merged model's tokenizer and the rows of its embeddings (mergekit `tokenizer`)."""

    source: str  # "union", "base" or a model
    tokens: Mapping[str, TokenRule | None] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge: what is merged, how, and what the result is like."""

    method: str
    sections: tuple[Section, ...]  # one after another, from the first layer to the last
    base: str | None = None
    parameters: tuple[Settings, ...] = ()  # of the module and of all, in this order
    dtype: str | None = None  # of the arithmetic; that of the inputs if None
    out_dtype: str | None = None  # of the result; that of the arithmetic if None
    vocabulary: VocabularyRule | None = None
    chat_template: str | None = None
    seed: int = 0

    @property
    def models(self) -> list[str]:
        """Every model once, the base first, then in the order they are named."""
        named = [*([self.base] if self.base else []), *(s.model for section in self.sections for s in section.sources)]
        rule = self.vocabulary
        if rule:
            named += [rule.source] if rule.source not in ("union", "base") else []
            named += [token.model for token in rule.tokens.values() if token and token.model]
        return list(dict.fromkeys(named))


def read_recipe(file: pathlib.Path) -> Recipe:
    """Reads a file in mergekit's YAML.

    Raises:
      UserError: it is missing, not YAML, or not a recipe; the sentence names the key.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8'}.") from e
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        raise UserError(f"{file}: is not YAML: {' '.join(str(e).split())}.") from e
    return recipe_of(content, str(file))


def recipe_of(content: Any, where: str) -> Recipe:
    """Checks what a YAML file holds.

    Raises:
      UserError: a key is unknown, missing or of the wrong type.
    """
    top = _table(content, _TOP, where)
    method = _text(top, "merge_method", where)
    if method is None:
        raise UserError(f"{where}: merge_method is missing.")
    base = _model(top.get("base_model"), f"{where}: base_model")
    given = [key for key in ("models", "slices", "modules") if top.get(key)]
    if len(given) != 1:
        raise UserError(f"{where}: exactly one of models, slices and modules must be there, found {given or 'none'}.")
    body, module = top, {}
    if given == ["modules"]:
        modules = top["modules"]
        if not isinstance(modules, dict) or list(modules) != [_ONLY_MODULE]:
            found = list(modules) if isinstance(modules, dict) else modules
            raise UserError(f"{where}: modules must have {_ONLY_MODULE!r} only, found {found!r}.")
        body = _table(modules[_ONLY_MODULE], _MODULE, f"{where}: modules.{_ONLY_MODULE}")
        module = _settings(body, f"{where}: modules.{_ONLY_MODULE}")
        if bool(body.get("models")) == bool(body.get("slices")):
            raise UserError(f"{where}: modules.{_ONLY_MODULE} must have either models or slices.")
    sections = _models(body["models"], base, where) if body.get("models") else _slices(body["slices"], base, where)
    seed = top.get("random_seed")
    if seed is not None and type(seed) is not int:
        raise UserError(f"{where}: random_seed must be an integer, found {seed!r}.")
    return Recipe(
        method,
        sections,
        base,
        (module, _settings(top, where)),
        _dtype(top, "dtype", where),
        _dtype(top, "out_dtype", where),
        _vocabulary(top, where),
        _text(top, "chat_template", where),
        seed or 0,
    )


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _table(content: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a table of {', '.join(keys)}, found {content!r}.")
    for key, value in content.items():
        if key not in keys:
            raise UserError(f"{where}: the key {key!r} is not supported, found {value!r}; keys are {', '.join(keys)}.")
    return content


def _list(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: must be a list with at least one entry, found {content!r}.")
    return content


def _text(table: Mapping[str, Any], key: str, where: str) -> str | None:
    found = table.get(key)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise UserError(f"{where}: {key} must be text, found {found!r}.")
    return found


def _dtype(table: Mapping[str, Any], key: str, where: str) -> str | None:
    found = table.get(key)
    if found is not None and found not in DTYPES:
        raise UserError(f"{where}: {key} must be one of {', '.join(DTYPES)}, found {found!r}.")
    return found


def _model(found: Any, where: str) -> str | None:
    """A model as SRC or SRC+ADAPTER, from mergekit's short form or its long one."""
    if found is None:
        return None
    if isinstance(found, dict):
        table = _table(found, _REFERENCE, where)
        if table.get("override_architecture") is not None:
            raise UserError(f"{where}.override_architecture must be absent, found {table['override_architecture']!r}.")
        parts = [_path(table.get("model"), f"{where}.model")]
        parts += [_path(table["lora"], f"{where}.lora")] if table.get("lora") is not None else []
        found = "+".join(parts)
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{where}: must name a model, found {found!r}.")
    return found


def _path(found: Any, where: str) -> str:
    if isinstance(found, dict):
        table = _table(found, _PATH, where)
        if table.get("revision") is not None:
            raise UserError(f"{where}.revision is not supported, found {table['revision']!r}; give a local folder.")
        found = table.get("path")
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{where}: must be a path, found {found!r}.")
    return found


def _settings(table: Mapping[str, Any], where: str) -> Settings:
    found = table.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{where}: parameters must be a table, found {found!r}.")
    return found


def _models(found: Any, base: str | None, where: str) -> tuple[Section, ...]:
    sources = []
    for at, entry in _entries(found, f"{where}: models"):
        table = _table(entry, _MODEL, at)
        sources.append(SourceRange(_needed(table, at), None, _settings(table, at)))
    if base and base not in [source.model for source in sources]:
        sources.append(SourceRange(base, None))  # mergekit appends it, whatever the method
    return (Section(tuple(sources), base),)


def _slices(found: Any, base: str | None, where: str) -> tuple[Section, ...]:
    sections = []
    for at, entry in _entries(found, f"{where}: slices"):
        table = _table(entry, _SLICE, at)
        sources = []
        for inner, one in _entries(table.get("sources"), f"{at}.sources"):
            source = _table(one, _SOURCE, inner)
            sources.append(SourceRange(_needed(source, inner), _range(source, inner), _settings(source, inner)))
        own = _model(table.get("base_model"), f"{at}.base_model") or base
        sections.append(Section(tuple(sources), own, _settings(table, at)))
    return tuple(sections)


def _entries(found: Any, where: str) -> Iterator[tuple[str, Any]]:
    for i, entry in enumerate(_list(found, where)):
        yield f"{where}[{i}]", entry


def _needed(table: Mapping[str, Any], where: str) -> str:
    model = _model(table.get("model"), f"{where}.model")
    if model is None:
        raise UserError(f"{where}: model is missing.")
    return model


def _range(table: Mapping[str, Any], where: str) -> tuple[int, int]:
    found = table.get("layer_range")
    if not isinstance(found, list) or len(found) != 2 or any(type(x) is not int for x in found):
        raise UserError(f"{where}: layer_range must be two integers, found {found!r}.")
    if not 0 <= found[0] < found[1]:
        raise UserError(f"{where}: layer_range must be [first, end] with 0 <= first < end, found {found!r}.")
    return found[0], found[1]


def _vocabulary(top: Mapping[str, Any], where: str) -> VocabularyRule | None:
    if top.get("tokenizer_source") is not None and top.get("tokenizer") is not None:
        raise UserError(f"{where}: tokenizer_source and tokenizer exclude each other.")
    if (source := _model(top.get("tokenizer_source"), f"{where}: tokenizer_source")) is not None:
        return VocabularyRule(_without_prefix(source))
    if top.get("tokenizer") is None:
        return None
    at = f"{where}: tokenizer"
    table = _table(top["tokenizer"], _TOKENIZER, at)
    multiple = table.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise UserError(f"{at}.pad_to_multiple_of must be a positive integer, found {multiple!r}.")
    tokens = table.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise UserError(f"{at}.tokens must be a table, found {tokens!r}.")
    rules = {str(token): _token(rule, f"{at}.tokens[{token!r}]") for token, rule in tokens.items()}
    return VocabularyRule(_without_prefix(_model(table.get("source"), f"{at}.source") or "union"), rules, multiple)


def _without_prefix(source: str) -> str:
    return source.removeprefix("model:")  # the form of mergekit's first versions


def _token(found: Any, where: str) -> TokenRule | None:
    table = _table(found or {}, _TOKEN, where)
    force = table.get("force") or False
    if not isinstance(force, bool):
        raise UserError(f"{where}.force must be true or false, found {force!r}.")
    source = table.get("source")
    if source is None:
        if force:
            raise UserError(f"{where}: force needs a source.")
        return None
    if not (isinstance(source, dict) and "kind" in source):
        return TokenRule(_model(source, f"{where}.source"), None, force)
    table = _table(source, _TOKEN_SOURCE, f"{where}.source")
    if table["kind"] == "zero":
        return TokenRule(None, None, force)
    if table["kind"] != "model_token":
        raise UserError(f"{where}.source.kind must be zero or model_token, found {table['kind']!r}.")
    model, text, number = _needed(table, f"{where}.source"), table.get("token"), table.get("token_id")
    if (text is None) == (number is None) or not isinstance(text, str | None) or not isinstance(number, int | None):
        raise UserError(f"{where}.source must have either token or token_id, found {table!r}.")
    return TokenRule(model, text if number is None else number, force)


def short_recipe(
    method: str, models: Sequence[tuple[str, float]], base: str | None, density: float | None, dtype: str | None
) -> Recipe:
    """The recipe of `--method` and `--model SRC:WEIGHT`.

    For slerp the weights' ratio is `t`, counted from the first model.

    Raises:
      UserError: the method needs other inputs.
    """
    content: dict[str, Any] = {"merge_method": method}
    if method == "slerp":
        if len(models) != 2:
            raise UserError(f"slerp merges two models, found {len(models)}.")
        (first, a), (second, b) = models
        if not a + b:
            raise UserError("the weights of slerp must not sum to 0.")
        content |= {"base_model": base or first, "models": [{"model": first}, {"model": second}]}
        t = (b if content["base_model"] == first else a) / (a + b)
        content["parameters"] = {"t": t}
    else:
        own = {} if density is None else {"density": density}
        content["models"] = [{"model": model, "parameters": {"weight": weight, **own}} for model, weight in models]
        if method in ("model_stock", "passthrough"):
            content["models"] = [{"model": model} for model, _ in models]
        content |= {"base_model": base} if base else {}
    content |= {"dtype": dtype} if dtype else {}
    return recipe_of(content, "--method")
