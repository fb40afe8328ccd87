"""Settings as pydantic models: read from YAML, changed by `key=value`, printed with their descriptions.

Unknown keys and values out of range are errors of one sentence that names the key, the value seen and what is right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from ppcl.config.location import Location
from ppcl.errors import UserError


class Section(BaseModel):
    """A group of configuration keys.

    `renamed` maps an old key of the section to its new one. Old keys keep working for one version, with a warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _refuse_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes `True` for 1."""
        kinds = _members(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("input should be a number, not true or false")
        return value

    @model_validator(mode="before")
    @classmethod
    def _accept_old_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values, renames = rename_keys(cls, values)
        _warn(renames, cls.__name__)
        return values


Model = TypeVar("Model", bound=Section)

_LONGEST_VALUE = 100
_WORDS = {"a valid dictionary": "a mapping of keys to values", "a valid tuple": "a list"}


def read_values(model: type[Section], path: Path, command: str) -> dict[str, Any]:
    """Read the mapping of a YAML file, not validated yet. `command` prints one to start from. Raises `UserError`."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"the configuration {path} does not exist; `{command}` prints one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"the configuration {path} is not a mapping of keys to values; `{command}` prints one")
    # A section whose keys are all commented out reads as None.
    return {key: value for key, value in values.items() if value is not None or key not in sections(model)}


def rename_keys(model: type[Section], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of `values` with old keys renamed, in the sections below too, and what was renamed, by dotted key.

    Raises `UserError` where a key is given under its old and its new name.
    """
    current: dict[str, Any] = {}
    renames: dict[str, str] = {}
    below = sections(model)
    for key, value in values.items():
        name = model.renamed.get(key, key)
        if name != key:
            if name in values:
                raise UserError(f"{key} is the old name of {name}, and both are given; remove {key}")
            renames[key] = name
        if name in below and isinstance(value, dict):
            try:
                value, renames_below = rename_keys(below[name], value)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            renames |= {f"{key}.{old}": f"{name}.{new}" for old, new in renames_below.items()}
        current[name] = value
    return current, renames


def current_keys(model: type[Section], values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` with old keys renamed. Logs one warning that names the new keys. Raises `UserError` as `rename_keys`."""
    try:
        values, renames = rename_keys(model, values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    _warn(renames, source)
    return values


def _warn(renames: Mapping[str, str], source: str) -> None:
    if renames:
        pairs = ", ".join(f"{old} is now {new}" for old, new in renames.items())
        logging.getLogger(__name__).warning("%s: %s; the next version does not know the old names", source, pairs)


def put(model: type[Section], values: dict[str, Any], override: str, example: str) -> None:
    """Apply `key.sub=value`, with a YAML value, to values of a model. Raises `UserError`."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override!r} is not of the form key=value, such as {example}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from None
    *above, last = _current_path(model, key.split("."), f"--set {override!r}")
    for section in above:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override!r}: {section} is a value, not a section")
    values[last] = value


def _current_path(model: type[Section], path: list[str], source: str) -> list[str]:
    """A dotted key's parts with old names renamed. Logs a warning that names the new key."""
    section: type[Section] | None = model
    current = []
    for part in path:
        current.append(section.renamed.get(part, part) if section else part)
        section = sections(section).get(current[-1]) if section else None
    if current != path:
        _warn({".".join(path): ".".join(current)}, source)
    return current


def validated(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Build the model. Raises `UserError` that begins with `source`, where the values come from."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_sentence(model, error)}") from None


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """The sections of a section, by key."""
    return {
        name: type(field.default) for name, field in model.model_fields.items() if isinstance(field.default, Section)
    }


def _sentence(model: type[Section], error: ValidationError) -> str:
    """The first of pydantic's complaints as one sentence."""
    first = error.errors()[0]
    section, path = _place(model, first["loc"])
    key, value = ".".join(path), _shown(first["input"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden" and section is not None:
        known = list(section.model_fields)
        return f"unknown key {key}{_nearest(model, path, known)}; known here: {', '.join(known)}{more}"
    if first["type"] == "missing" or (first["input"] is None and _is_required(section, path[-1])):
        return f"the key {key} is missing{more}"
    if first["type"] == "model_type" and section is not None:
        return f"{key} is {value}: it is a section, with the keys {', '.join(section.model_fields)}{more}"
    if path[-1] == "[key]":
        return f"{'.'.join(path[:-2])} has the key {value}, which is not text; put it in quotes{more}"
    message = first["msg"].removeprefix("Value error, ")
    for pydantics, ours in _WORDS.items():
        message = message.replace(pydantics, ours)
    return f"{key} is {value}: {message[0].lower() + message[1:]}{more}"


def _shown(value: Any) -> str:
    """A value as a message shows it: a long one is cut."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _is_required(section: type[Section] | None, key: str) -> bool:
    return section is not None and key in section.model_fields and section.model_fields[key].is_required()


def _nearest(model: type[Section], path: list[str], known: list[str]) -> str:
    """What an unknown key may have been meant as: a key of another section, or one that is written like it."""
    *above, key = path
    elsewhere = [f"{name}.{key}" for name, section in sections(model).items() if key in section.model_fields]
    if elsewhere:
        return f"; there is {', '.join(elsewhere)}"
    near = get_close_matches(key, known, n=1)
    return f"; the nearest is {'.'.join([*above, *near])}" if near else ""


def _place(model: type[Section], location: tuple[int | str, ...]) -> tuple[type[Section] | None, list[str]]:
    """The section that an error is about, and the parts of its dotted key, without the names of a union's members."""
    kind: Any = model
    section: type[Section] | None = model
    path: list[str] = []
    for part in location:
        members = _members(kind)
        if len(members) > 1:
            # Pydantic names the member that it tried.
            kind = next((member for member in members if str(part).startswith(_name(member))), None)
            continue
        kind = members[0] if members else None
        path.append(str(part))
        if isinstance(kind, type) and issubclass(kind, Section):
            section = kind
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:
            arguments = get_args(kind)
            kind = arguments[-1] if arguments and part != "[key]" else None
    members = _members(kind)
    if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], Section):
        section = members[0]
    return section, path


def _members(kind: Any) -> list[Any]:
    """The types that a type is a union of, without None; `Annotated` is looked through."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return [member for member in get_args(kind) if member is not type(None)]


def _name(kind: Any) -> str:
    return getattr(get_origin(kind) or kind, "__name__", str(kind))


def commented(model: type[Section]) -> str:
    """The full default configuration as YAML, every key described."""
    lines = [f"# {(model.__doc__ or '').strip()}"]
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            lines += ["", f"# {(field.default.__doc__ or '').strip()}", f"{name}:"]
            for key, sub in type(field.default).model_fields.items():
                lines += _described(key, sub.get_default(call_default_factory=True), sub.description, indent="  ")
        else:
            lines += _described(name, None if field.is_required() else field.default, field.description, indent="")
            if field.is_required():
                lines[-1] = f"{name}: # required"
    return "\n".join(lines) + "\n"


def _described(key: str, value: Any, description: str | None, indent: str) -> list[str]:
    value = str(value) if isinstance(value, Path | Location) else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return [f"{indent}# {description}", f"{indent}{key}: {text}"]
