"""The commands of `peft-core` and their options. Other modules of this package implement them; modules that use torch are imported on call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from . import output, overview
from .output import Report

app = typer.Typer(
    name="peft-core",
    help="Adapters of any method: what is installed, what is in a folder, merging and converting.",
    epilog="Exit codes: 0 fine; 1 faults were found; 2 it can't be done as asked; 3 a fault of the program. See docs/cli.md.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
AdapterDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder, or the folder of a stack.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False) -> None:
    if version:
        typer.echo(f"peft-core {__version__}")
        raise typer.Exit


def _show(work: Callable[[], Report], command: str, as_json: bool, **options: bool) -> None:
    def render(report: Report) -> Iterator[object]:
        from . import render as renderers

        yield from getattr(renderers, command)(report, **options)

    raise typer.Exit(output.run(work, render, as_json=as_json))


@app.command()
def plugins(as_json: Json = False) -> None:
    """List tuners and other plugins. None of them is imported."""
    _show(overview.overview, "plugins", as_json)


@app.command()
def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of each failure.")] = False, as_json: Json = False
) -> None:
    """Import every plugin and report faults.

    Broken, in conflict, incompatible with this peft-core, or slow to import; and whether what core needs is there.
    """
    from . import doctor as doctoring

    _show(doctoring.examine, "doctor", as_json, verbose=verbose)


@app.command("new-tuner")
def new_tuner(
    name: Annotated[str, typer.Argument(help="Name of the method, such as my-method.")],
    kind: Annotated[str, typer.Option(help="layer: it wraps layers; prompt: it adds virtual tokens.")] = "layer",
    directory: Annotated[Path, typer.Option(help="Where the package's folder goes.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a new tuner package.

    It builds, is discovered and passes the conformance suite.
    """

    def work() -> Report:
        from .new_tuner import create

        return {"folder": str(create(name, kind, directory))}

    _show(work, "new_tuner", as_json)


@app.command()
def inspect(directory: AdapterDirectory, as_json: Json = False) -> None:
    """Show what is in an adapter folder.

    Config, tensors, sizes, who wrote it and for what base. Its tuner need not be installed.
    """

    def work() -> Report:
        from . import inspecting

        return inspecting.inspect(directory)

    _show(work, "inspect", as_json)


@app.command()
def verify(
    directory: AdapterDirectory,
    base: Annotated[Path | None, typer.Option(metavar="MODEL_DIR", help="A base that it is to fit; no weights of it are read.")] = None,
    as_json: Json = False,
) -> None:
    """Check an adapter folder.

    Is it readable, finite, consistent; with --base: does it fit?
    """

    def work() -> Report:
        from . import verifying

        with _progress("checking", as_json, functools.partial(verifying.tensors_in, directory)) as step:
            return verifying.verify(directory, base, step)

    _show(work, "verify", as_json)


@app.command()
def targets(
    model: Annotated[Path, typer.Argument(metavar="MODEL_CONFIG_OR_DIR", help="Model folder or config.json.")], as_json: Json = False
) -> None:
    """Show what of a model can be adapted.

    Names of layers by kind, and what each installed tuner adapts by default.
    """

    def work() -> Report:
        from . import targets as targeting

        return targeting.targets(model)

    _show(work, "targets", as_json)


@app.command()
def merge(
    directory: AdapterDirectory,
    base: Annotated[Path, typer.Option(metavar="MODEL_DIR", help="Folder of the base model.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="New folder for the merged model.")],
    safe: Annotated[bool, typer.Option("--safe", help="Refuse results that are not finite.")] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base.

    The result is a model folder that needs no PEFT library.
    """
    watched = output.progress_wanted(as_json)

    def work() -> Report:
        from . import merging

        stage = functools.partial(typer.echo, err=True) if watched else (lambda _: None)
        return merging.merge(directory, base, out, safe=safe, progress=watched, stage=stage)

    _show(work, "merge", as_json)


@app.command()
def convert(
    directory: AdapterDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; may be DIR itself.")],
    form: Annotated[str, typer.Option("--format", help="safetensors or bin.")] = "safetensors",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: as it is.")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="REGEX=REPLACEMENT", help="Rename tensors; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Rewrite an adapter folder.

    In another format or dtype, or with its tensors under other names.
    """

    def work() -> Report:
        from . import converting

        return converting.convert(directory, out, form=form, dtype=dtype, rename=rename or ())

    _show(work, "convert", as_json)


@contextlib.contextmanager
def _progress(what: str, as_json: bool, total: Callable[[], int]) -> Iterator[Callable[[], None]]:
    """Context manager that yields a function to call after each step; shows a progress bar if stderr is a terminal and `as_json` is False."""
    if not output.progress_wanted(as_json):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total() or None)
        yield lambda: bar.advance(task)
