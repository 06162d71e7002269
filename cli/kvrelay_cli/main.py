"""Entry point of `kvrelay`: finds the command, parses its flags, runs it, reports errors in one line.

Starts fast: a command's module is imported only when that command is asked for. Exit codes: 0 done; 2 the caller
must change something (flags, files, request); 1 everything else that went wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from kvrelay_cli.config_file import set_defaults_from
from kvrelay_core.errors import ConfigError, InvalidRequestError, KvRelayError, MismatchError, UnauthenticatedError

COMMANDS = {
    "up": "run a whole cluster on this machine: router, prefill and decode as separate processes",
    "serve": "run one role: router, prefill or decode",
    "generate": "send one prompt and print the answer as it comes",
    "doctor": "say what this machine can do: devices, shared memory, connectors and their GB/s",
    "cache": "look into the tiers that keep KV on disk and in Redis: what is there, is it whole, remove it",
    "bench": "measure: how fast the connectors move KV blocks here, and other benchmarks",
}

EXIT_FAILED = 1
EXIT_MUST_CHANGE = 2
EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  kvrelay up --model ./my-model                       a cluster of one prefill and one decode worker
  kvrelay generate --target 127.0.0.1:50051 --prompt "Once upon a time" --max-tokens 64
  kvrelay doctor                                      what can this machine do?

`kvrelay COMMAND --help` shows the flags of a command.
"""


class Command(Protocol):
    """What a module in `kvrelay_cli.commands` offers."""

    EPILOG: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def build_parser(command_name: str | None) -> argparse.ArgumentParser:
    """The parser of `kvrelay`, with the flags of one command filled in."""
    parser = argparse.ArgumentParser(
        prog="kvrelay",
        description="Serves large language models with separate prefill and decode processes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        child = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == command_name:
            command = load_command(name)
            child.epilog = command.EPILOG
            child.set_defaults(leaf_parser=child)
            command.add_arguments(child)
    return parser


def load_command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"kvrelay_cli.commands.{name}"))


def exit_code_of(error: KvRelayError) -> int:
    must_change = (ConfigError, InvalidRequestError, MismatchError, UnauthenticatedError)
    return EXIT_MUST_CHANGE if isinstance(error, must_change) else EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command_name = next((word for word in words if word in COMMANDS), None)
    parser = build_parser(command_name)
    try:
        args = parser.parse_args(words)
        if getattr(args, "config", None) is not None:
            set_defaults_from(args.leaf_parser, Path(args.config))
            args = parser.parse_args(words)
        if args.version:
            return print_version()
        if args.command is None:
            parser.print_help(sys.stderr)
            return EXIT_MUST_CHANGE
        return load_command(args.command).run(args)
    except KvRelayError as error:
        print(f"kvrelay: {error.message}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return EXIT_FAILED


def print_version() -> int:
    from importlib.metadata import version

    print(f"kvrelay {version('kvrelay')}")
    return 0
