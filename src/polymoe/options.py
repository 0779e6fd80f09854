"""One definition of an option: a field of a record says in its annotation what it means and what it may be.

    max_num_seqs: Annotated[int, Option("sequences that run at once", at_least=1)] = 64

From it follow the flag `--max-num-seqs` (`polymoe.cli.options` makes it), the variable `POLYMOE_MAX_NUM_SEQS`, the key
`max_num_seqs` of a TOML file, and the check of what Python code passes. The flag goes before the variable, the variable
before the file, the file before the default.
"""

import difflib
import json
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from polymoe.errors import ConfigError, PolymoeError
from polymoe.field_types import wrong_value

PREFIX = "POLYMOE_"
# Variables that are no options: read where a library is loaded, or by tests, before or without a command line.
_NO_OPTIONS = ("CONFIG", "URL", "KERNELS", "NO_KERNELS", "CPU_LEVEL", "NO_AUTOTUNE", "STRICT_TESTS")


@dataclass(frozen=True)
class Option:
    """What the annotation of a field says beside its type.

    name: of the flag, the key and the variable, where it is not the field's. flag: whether command lines have it.
    shown: the default as one types it. variable: whether --help names the variable. ranged: whether --help shows the
    bounds (a value beyond them is then a usage error). secret: is not printed by --check-config.
    read: (what was given, where) -> the field's value, for what is written otherwise than in Python.
    check: raises `ConfigError` for a value that is wrong in a way that bounds do not say.
    """

    help: str
    name: str = ""
    flag: bool = True
    metavar: str | None = None
    shown: str | None = None
    variable: bool = False
    ranged: bool = False
    secret: bool = False
    at_least: int | None = None
    at_most: int | None = None
    more_than: int | None = None
    read: Callable[[Any, str], Any] | None = None
    check: Callable[[Any], object] | None = None


@dataclass(frozen=True)
class Field:
    """An option and the field that it belongs to."""

    attribute: str
    type: Any
    default: Any
    option: Option

    @property
    def key(self) -> str:
        return self.option.name or self.attribute

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()

    @property
    def is_list(self) -> bool:
        """Whether a command line repeats it, and a variable separates its values by spaces."""
        return typing.get_origin(self.type) in (dict, tuple, Mapping)

    @property
    def shown(self) -> Any:
        """The default as one types it."""
        return self.option.shown or self.default

    def check(self, value: Any, name: str) -> None:
        """Raise `ConfigError` for a value of a wrong type or out of range; `name` is what the message calls it."""
        option = self.option
        if (wrong := wrong_value(self.type, value)) is not None:
            raise ConfigError(f"{name} must be {wrong}.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high, above = option.at_least, option.at_most, option.more_than
            if low is not None and not low <= value <= (math.inf if high is None else high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{name} must be {bounds}, got {value}.")
            if above is not None and not above < value:
                off = "; leave it out to switch it off" if type(None) in typing.get_args(self.type) else ""
                raise ConfigError(f"{name} must be more than {above}, got {value:g}{off}.")
            if not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, got {value}.")
        if option.check is not None:
            option.check(value)

    def value(self, given: Any, where: str, name: str) -> Any:
        """What was given as a flag, a text of the environment or a value of a file -> the field's value, checked.

        where: the flag, the variable, or the file with the key: read functions name it. Raises `ConfigError`.
        """
        value = given if self.option.read is None else self.option.read(given, where)
        if isinstance(value, list):
            value = tuple(value)
        self.check(value, name)
        return value

    def of_text(self, text: str) -> Any:
        """A variable's text as what a command line or a file would give."""
        if self.is_list:
            return text.split()
        try:
            return msgspec.convert(text, self.type, strict=False)
        except msgspec.ValidationError:  # something to read, or `check` says what it must be
            return text


@cache
def options_of(kind: type[msgspec.Struct]) -> tuple[Field, ...]:
    """The options of a record, in its order."""
    return tuple(
        Field(
            field.name, typing.get_args(field.type)[0],
            field.default if field.default is not msgspec.NODEFAULT else field.default_factory(), option,
        )
        for field in msgspec.structs.fields(kind)
        for option in getattr(field.type, "__metadata__", ())
        if isinstance(option, Option)
    )  # fmt: skip


def check_options(record: msgspec.Struct) -> None:
    """Raise `ConfigError` for the first field whose value is of a wrong type or out of range."""
    for field in options_of(type(record)):
        field.check(getattr(record, field.attribute), field.attribute)


@dataclass(frozen=True)
class Setting:
    """The value of an option, what was given for it, and where: a flag, a variable, a file or "default"."""

    field: Field
    value: Any
    given: Any
    source: str


class Settings:
    """The options of one command, each with its value and where it comes from."""

    def __init__(self, settings: Iterable[Setting]) -> None:
        self._settings = {setting.field.key: setting for setting in settings}

    def __getitem__(self, key: str) -> Any:
        return self._settings[key].value

    def of(self, kind: type[msgspec.Struct]) -> dict[str, Any]:
        """The fields of `kind` that are options here, to construct it."""
        return {
            field.attribute: self._settings[field.key].value
            for field in options_of(kind)
            if field.key in self._settings
        }

    def lines(self) -> Iterator[str]:
        """A TOML file that says the same, each line with where its value comes from."""
        for key, setting in self._settings.items():
            if setting.given is None:
                line = f"# {key} is not set"
            elif setting.field.option.secret:
                line = f"# {key} is set"
            else:
                line = f"{key} = {_toml(setting.given)}"
            yield f"{line:<40} # {setting.source}"


def resolve(
    fields: Iterable[Field], flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None,
    known: Iterable[Field] = (),
) -> Settings:  # fmt: skip
    """The value of each of `fields`: of the flag, else of the variable, else of the file, else the default.

    Args:
        flags: key -> what was typed; only those that were.
        known: options of other commands, whose variables are no mistakes.

    Raises `ConfigError` for what is wrong in any of them, also where something else goes before it.
    """
    fields = list(fields)
    keys = [field.key for field in fields]
    variables = [*(field.variable for field in (*fields, *known)), *(PREFIX + name for name in _NO_OPTIONS)]
    for name in environment:
        if name.startswith(PREFIX) and name not in variables:
            raise ConfigError(f"${name} means nothing to polymoe; {_near(name, variables)}unset it.")
    table = {} if file is None else _read(file)
    for key in table:
        if key not in keys:
            raise ConfigError(f"{file}: there is no option {key!r}; {_near(key, keys)}see `polymoe serve --help`.")
    found = []
    for field in fields:
        key, setting = field.key, Setting(field, field.default, field.shown, "default")
        if key in table:
            setting = _setting(field, table[key], str(file), f"{file}: {key}")
        if text := environment.get(field.variable):  # an empty one is none
            setting = _setting(field, field.of_text(text), f"${field.variable}", f"${field.variable}")
        if key in flags:
            flag = "--" + key.replace("_", "-") if field.option.flag else "arguments"
            setting = Setting(field, field.value(flags[key], flag, field.attribute), flags[key], flag)
        found.append(setting)
    return Settings(found)


def _setting(field: Field, given: Any, source: str, where: str) -> Setting:
    try:
        return Setting(field, field.value(given, where, where), given, source)
    except PolymoeError as error:
        raise ConfigError(f"{'' if str(error).startswith(where) else f'{where}: '}{error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]}? If not, " if near else ""


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
