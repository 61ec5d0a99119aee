# SPDX-License-Identifier: Apache-2.0
"""How a command line tool ends: with a user's mistake reported plainly, or with a clean stop. Knows no tool."""

import argparse
import difflib
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from nemo_aligner.errors import UserError
from nemo_aligner.launch.stacks import show_stacks_on_signal

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130  # 128 + SIGINT, as shells count
OS_ERROR_FIX = "check that the path is right, that it may be read or written, and that its disk has room"


def quiet_libraries(level: int = logging.WARNING) -> None:
    """Hear of the libraries what has ``level`` or more."""
    for noisy in ("megatron", "torch", "transformers", "fsspec", "hydra"):
        logging.getLogger(noisy).setLevel(level)


def conversion(
    doc: str | None, *, source: str = "--in-file", takes: str
) -> Callable[[Callable[[Path, str, bool], None]], Callable[[], None]]:
    """Make a tool's main out of a function of what is read, what is written, and whether that may be replaced.

    Args:
        doc: the tool's, for --help.
        source: the flag that names what is read; ``model=`` does too, and ``out=`` and ``overwrite=True`` are flags.
        takes: what may be read.
    """

    def decorate(convert: Callable[[Path, str, bool], None]) -> Callable[[], None]:
        def main() -> None:
            form = argparse.RawDescriptionHelpFormatter
            parser = argparse.ArgumentParser(description=doc, formatter_class=form)
            parser.add_argument(source, dest="source", type=Path, required=True, help=takes)
            parser.add_argument(
                "--out-file", required=True, help="what to write; a .nemo with / at its end: a folder"
            )
            parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
            short = {"model": source, "out": "--out-file"}
            words: list[str] = []
            for before, word in itertools.pairwise(["", *sys.argv[1:]]):
                name, _, value = word.partition("=")
                if name != word and name.isidentifier() and before not in short.values():
                    _refuse_unknown(name, [*short, "overwrite"])
                words += [short[name], value] if name in short else [word]
            flags = {"overwrite=true": ["--overwrite"], "overwrite=false": []}
            args = parser.parse_args([flag for word in words for flag in flags.get(word.lower(), [word])])
            convert(args.source, args.out_file, args.overwrite)

        return main

    return decorate


def _refuse_unknown(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}=?" if near else f"known settings: {', '.join(known)}"
        raise UserError(f"unknown setting {name}", fix=fix)


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs ``main`` with log lines on stderr and leaves the process.

    Exit codes: 0; 2 after a UserError or a file that cannot be read or written, printed without a
    traceback, its fix as the last line; 130 after Ctrl-C.
    """
    show_stacks_on_signal()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    quiet_libraries()
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_CODE)
    except OSError as error:
        sys.stderr.write(f"error: {error}\nFix: {OS_ERROR_FIX}\n")
        sys.exit(USER_ERROR_CODE)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED_CODE)
    sys.exit(0)
