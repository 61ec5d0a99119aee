# SPDX-License-Identifier: Apache-2.0
"""How a command line tool ends: with a user's mistake told plainly, or with a clean stop. Knows no tool."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from nemo_aligner.errors import UserError
from nemo_aligner.launch.stacks import show_stacks_on_signal

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130  # 128 + SIGINT, as shells count
OS_ERROR_CURE = "check that the path is right, that it may be read or written, and that its disk has room"


def quiet_libraries(level: int = logging.WARNING) -> None:
    """Hear of the libraries what has ``level`` or more."""
    for noisy in ("megatron", "torch", "transformers", "fsspec", "hydra"):
        logging.getLogger(noisy).setLevel(level)


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs ``main`` with log lines on stderr and leaves the process.

    Exit codes: 0; 2 after a UserError or a file that cannot be read or written, printed without a
    traceback, its cure as the last line; 130 after Ctrl-C.
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
        sys.stderr.write(f"error: {error}\nCure: {OS_ERROR_CURE}\n")
        sys.exit(USER_ERROR_CODE)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED_CODE)
    sys.exit(0)
