"""`python -m vispec.train`, for `accelerate launch -m vispec.train fit ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vispec.cli.loading import CommandError
from vispec.train.command import add_train_commands

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns: 0; 1 when something broke; 2 for bad input; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="vispec.train", description="Train a draft for a vision-language model.")
    add_train_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("vispec.train: interrupted; what was finished is whole", file=sys.stderr)
        return INTERRUPTED
    except (CommandError, ValueError, OSError, ImportError, FloatingPointError) as error:
        if arguments.traceback:
            raise
        print(f"vispec.train: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, FloatingPointError) else BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
