"""Arguments, and how errors leave the program."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import vispec
from vispec.cli import demo, doctor, generate
from vispec.cli.loading import CommandError
from vispec.train import command as train

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# What the caller can mend: said in one line, without a traceback.
INPUT_ERRORS = (CommandError, ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: 0; 1 when an answer differs or something broke; 2 for bad input; 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("vispec: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; nothing more is to be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"vispec: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, INPUT_ERRORS) else FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, INPUT_ERRORS):
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vispec",
        description="Lossless speculative decoding for Hugging Face vision-language models.",
    )
    parser.add_argument("--version", action="version", version=f"vispec {vispec.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")
    for command in (generate, demo, doctor):
        name = command.__name__.rpartition(".")[2]
        summary = command.__doc__.strip().splitlines()[0]
        own = commands.add_parser(name, parents=[shared], help=summary, description=summary)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    train.add_commands(commands)
    return parser
