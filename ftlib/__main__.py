"""``python -m ftlib COMMAND``: the commands of the library.

A new command is a module with `add_arguments(parser)` and `run(args)`, and a row in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name -> module, what it does
    "prepare": ("ftlib.data.preparation.command", "check and fix training data"),
    "preview": ("ftlib.data.preview_command", "show rows as a model gets them, trained tokens marked"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: of the command line, without the program; `None` takes those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m ftlib", description="Tools of the ftlib library.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        if name in given[:1]:  # the modules of the others stay unloaded
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(given)
    module, _ = COMMANDS[args.command]
    status: int = importlib.import_module(module).run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
