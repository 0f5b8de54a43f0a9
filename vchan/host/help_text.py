"""Writes what --help and --version say, and fails if it cannot: argparse does not notice."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Final

EXIT_OUTPUT: Final = 1
"""What --help or --version says was not written."""


def tell(program: str, text: str) -> None:
    """Write a program's text to standard output; end the program if that cannot be done."""
    problem = "it is closed"
    try:
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
    except BrokenPipeError:
        return  # the reader has seen enough
    except OSError as error:
        problem = str(error.strerror)
    sys.stderr.write(f"{program}: standard output cannot be written: {problem}\n")
    sys.stderr.flush()
    os._exit(EXIT_OUTPUT)  # the interpreter's end would try again, and complain at length


class Parser(argparse.ArgumentParser):
    """argparse's, which notices that its help was not written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stderr:
            super()._print_message(message, file)
        else:  # standard output, which may be none
            tell(self.prog, message)
