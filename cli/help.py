"""Help and shell completion: the table of options, handed to typer. Imported for these alone (typer is slow
to load)."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from safeimg.cli import commands
from safeimg.cli.main import program_name
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.overview import supported

FILES = ("image", "filename", "first", "second", "source", "target", "path")

OVERVIEW = (
    "qemu-img, made crash-safe.\n\nThe commands of qemu-img, with its options, output and exit codes. Kill "
    "one, fill the disk, cut the power: the image stays readable, and `resume` finishes the work or "
    "`rollback` takes it back."
)


def show(command: Command | None) -> int:
    """Prints the help of a command, or of the program: that one ends, as qemu-img's, with the formats supported."""
    if command is not None:
        return run_typer([command.name, "--help"])
    code = run_typer(["--help"])
    print(supported())
    return code


def run_typer(words: list[str]) -> int:
    """Lets typer answer: help, or what a shell asks to complete a line."""
    app = build()
    try:
        app(args=words, prog_name=program_name(), standalone_mode=False)
    except typer.Exit as finished:
        return int(finished.exit_code)
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 1
    return 0


def build() -> typer.Typer:
    """A typer application with every command of the table. They do nothing: the real parser runs them."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    app = typer.Typer(
        name="safeimg",
        help=OVERVIEW,
        rich_markup_mode="markdown",
        no_args_is_help=True,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def program(  # the function is only looked at
        version: Annotated[bool, typer.Option("--version", "-V", help="Show the version and exit.")] = False,
    ) -> None:
        """Options in front of the command."""

    for command in filter(None, map(commands.find, commands.names())):
        app.command(
            command.name,
            help=_description(command),
            short_help=command.summary,
            rich_help_panel="safeimg's own" if command.new else "qemu-img's",
            context_settings={"help_option_names": ["-h", "--help"]},
        )(_function(command))
    return app


def _description(command: Command) -> str:
    parts = [command.summary]
    if command.details:
        parts.append(command.details)
    examples = "\n".join(f"- {what}: `{program_name()} {line}`" for what, line in command.examples)
    parts.append(f"**Examples**\n\n{examples}")
    return "\n\n".join(parts)


def _function(command: Command) -> Callable[..., None]:
    """A function whose signature is the command's syntax, for typer to read."""
    parameters = [_argument(argument) for argument in command.arguments]
    parameters += [_option(option) for option in command.options if option.name != "help"]

    def nothing(**_: Any) -> None:
        """Never called for its effect."""

    names: dict[str, int] = {}
    unique = []
    for parameter in parameters:  # -p and --progress are one to a command, two to typer
        count = names[parameter.name] = names.get(parameter.name, 0) + 1
        unique.append(parameter if count == 1 else parameter.replace(name=f"{parameter.name}_{count}"))
    nothing.__signature__ = inspect.Signature(unique)  # type: ignore[attr-defined]
    nothing.__annotations__ = {parameter.name: parameter.annotation for parameter in unique}
    return nothing


def _argument(argument: Argument) -> inspect.Parameter:
    kind: Any = Path if argument.name in FILES else str
    if argument.several:
        kind = list[kind]
    default = inspect.Parameter.empty if argument.required else None
    is_operand = "=" in argument.name
    label = argument.name if is_operand else argument.name.upper()
    return inspect.Parameter(
        argument.name.partition("=")[0] + ("_" if is_operand else ""),  # `if` is a word of Python
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            kind if argument.required else kind | None,
            typer.Argument(help=argument.help, metavar=label),
        ],
    )


def _option(option: Option) -> inspect.Parameter:
    spellings = [
        text for text in (option.long and f"--{option.long}", option.short and f"-{option.short}") if text
    ]
    name = option.name.replace("-", "_")
    if option.argument is None:
        info = typer.Option(*spellings, help=option.help)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info]
        )
    info = typer.Option(*spellings, help=option.help, metavar=option.argument)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info]
    )
