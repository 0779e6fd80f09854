"""Options of a command -> its flags, and what it is called with -> their values."""

import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from polymoe.config import EngineConfig, PlanConfig
from polymoe.offline.plan.options import PlanOptions
from polymoe.options import Field, options_of, resolve
from polymoe.server.settings import ServerSettings

SERVE = (*options_of(ServerSettings), *options_of(PlanConfig), *options_of(EngineConfig))
PLAN = (*options_of(PlanConfig), *options_of(PlanOptions))
Command = Callable[..., None]
Specs = Annotated[
    list[str], typer.Argument(metavar="NAME=PATH…", help="a directory, or org/model[@revision] on the Hub")
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VARIANT=FILE",
        help="held-out text, as for --calibrate: measure at the end what a variant lost, and record it",
    ),
]


def some(fields: tuple[Field, ...], keys: str, **defaults: Any) -> tuple[Field, ...]:
    """Those of `fields` with these keys, separated by spaces, in this order. defaults: other ones, by key."""
    by_key = {field.key: field for field in fields}
    return tuple(replace(by_key[key], default=defaults.get(key, by_key[key].default)) for key in keys.split())


def takes(fields: tuple[Field, ...], file: str = "") -> Callable[[Command], Command]:
    """Decorates a command that has a parameter `settings: Settings`: its command line has the flags of `fields` there,
    and it is called with their values.

    A parameter that has the name of an option without a flag is what was typed for it. file: the parameter that names a
    file of options.
    """

    def decorate(command: Command) -> Command:
        def run(ctx: typer.Context, **given: Any) -> None:
            typed = {field.key: given[field.key] for field in fields if field.key in given and _is_typed(ctx, field)}
            settings = resolve(fields, typed, os.environ, given.get(file), known=(*SERVE, *PLAN))
            command(settings=settings, **{name: given[name] for name in own if name != "settings"})

        own = inspect.signature(command, eval_str=True).parameters
        parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for name, parameter in own.items():
            if name == "settings":
                parameters += [_flag(field) for field in fields if field.option.flag]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__name__, run.__doc__, run.__annotations__ = command.__name__, command.__doc__, {}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _is_typed(ctx: typer.Context, field: Field) -> bool:
    source = ctx.get_parameter_source(field.key)
    return source is not None and source.name == "COMMANDLINE"


def _flag(field: Field) -> inspect.Parameter:
    """The parameter of typer's; what is not a plain value is typed as text, and `Field.value` reads it."""
    option = field.option
    kind, default = field.type, field.shown
    if field.is_list:
        kind, default = list[str] | None, None
    elif option.shown is not None or typing.get_origin(kind) is typing.Literal:
        kind = str
    flag = typer.Option(
        "--" + field.key.replace("_", "-"), help=option.help, metavar=option.metavar,
        envvar=field.variable if option.variable else None,
        min=option.at_least if option.ranged else None, max=option.at_most if option.ranged else None,
    )  # fmt: skip
    return inspect.Parameter(
        field.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, flag]
    )
