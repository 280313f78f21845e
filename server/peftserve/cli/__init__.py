"""The command line: `peftserve serve | generate | adapters | loadtest | model | demo`.

Nothing heavy is imported here: each command imports what it needs when it runs, so that `--help` answers at once.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from peftserve import __version__
from peftserve.cli import adapters, demo, generate, loadtest, model, serve
from peftserve.errors import ConfigurationError, PeftserveError
from peftserve_client.errors import ApiError, ClientError

app = typer.Typer(
    help="One NF4 base model, many adapters of different kinds, mixed in one batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.command())
app.command("generate")(generate.generate)
app.add_typer(adapters.app, name="adapters")
app.command("loadtest")(loadtest.loadtest)
app.add_typer(model.app, name="model")
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"peftserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> NoReturn:
    """Run the command line. Exit status: 0 well, 1 the command failed, 2 wrong usage or settings, 130 interrupted."""
    # gRPC's own log lines say what our errors say better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app()
    except ConfigurationError as error:
        _fail(error.message, error.faults, 2)
    except PeftserveError as error:
        _fail(error.message, error.faults, 1)
    except ApiError as error:
        where = f" (request {error.request_id})" if error.request_id else ""
        _fail(f"{error.message}{where}", error.faults, 1)
    except ClientError as error:
        _fail(str(error), [], 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Who read our output has gone; Python would complain again while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _fail(message: str, faults: list[str], code: int) -> NoReturn:
    """One line, and the faults that it does not name."""
    lines = [f"error: {message}", *(f"  - {fault}" for fault in faults if fault not in message)]
    print("\n".join(lines), file=sys.stderr)  # noqa: T201
    sys.exit(code)
