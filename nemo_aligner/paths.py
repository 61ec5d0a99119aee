# SPDX-License-Identifier: Apache-2.0
"""The type of settings that name a file or folder: text, whose ``~`` is the user's home. Knows no setting."""

import os
from typing import Annotated

HOME_EXPANDED = "~ is the user's home"
PathText = Annotated[str, HOME_EXPANDED]


def expand_home(path: str) -> str:
    """The path with a leading ``~`` or ``~user`` replaced; a shell leaves it in KEY=~/PATH."""
    return os.path.expanduser(path)
