# SPDX-License-Identifier: Apache-2.0
"""Tools that a policy calls until it has a result.

trainer.ppo.rewards.NAME.environment=nemo_aligner.environments.tools.Tools
"trainer.ppo.rewards.NAME.arguments={functions: {python: nemo_aligner.environments.tools.python}, reward: MODULE.NAME}"
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from nemo_aligner.environments import sandbox
from nemo_aligner.environments.host import load

CALL = r"<tool_call>\s*(.*?)\s*</tool_call>"


class Tools:
    """Call what a turn asks for, and reply with the results; a turn that asks for nothing ends the episode.

    A call is a JSON object of "name" and "arguments", or "parameters". One that cannot be made, and one that fails, is
    replied to with the reason, so that the policy may try again.

    Args:
        functions: by the name that a call has, MODULE.NAME of each; it is called with the arguments as keywords.
        reward: MODULE.NAME of a function as in trainer.ppo.rewards, of the last turn; None: 0, others reward.
        reward_arguments: further arguments of it.
        pattern: a regular expression, whose group is a call.
        longest: characters of a result; the rest is left out.

    >>> tools = Tools({"count": "builtins.dict"})
    >>> tools.reset({}, seed=0)
    >>> tools.step('<tool_call>{"name": "count", "arguments": {"a": 1}}</tool_call>')
    ([{'role': 'tool', 'content': "{'a': 1}"}], 0.0)
    >>> tools.step("It is one.")
    (None, 0.0)
    """

    def __init__(
        self,
        functions: Mapping[str, str],
        reward: str | None = None,
        reward_arguments: Mapping[str, Any] | None = None,
        pattern: str = CALL,
        longest: int = 4000,
    ) -> None:
        self._functions = {name: load(path) for name, path in functions.items()}
        self._reward = None if reward is None else load(reward)
        self._reward_arguments, self._longest = reward_arguments or {}, longest
        self._pattern = re.compile(pattern, re.DOTALL)

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin an episode; the row is the reward function's."""
        del seed
        self._row = row

    def step(self, turn: str) -> tuple[list[dict[str, str]] | None, float]:
        """Return a message for each call of the turn; or None and the reward where there is none."""
        calls = self._pattern.findall(turn)
        if calls:
            return [{"role": "tool", "content": self._result(call)[: self._longest]} for call in calls], 0.0
        if self._reward is None:
            return None, 0.0
        given = {"prompt": self._row.get("prompt", ""), "response": turn, "tokens": [], "row": self._row}
        return None, self._reward(**self._reward_arguments, **given)

    def _result(self, text: str) -> str:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return 'error: a call is a JSON object, {"name": ..., "arguments": {...}}'
        function: Callable[..., object] | None = self._functions.get(str(name))
        if function is None:
            return f"error: there is no {name}, but {', '.join(self._functions)}"
        try:
            found = function(**arguments)
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"
        return found if isinstance(found, str) else repr(found)


def python(code: str) -> str:
    """Return what a Python program prints, and why it failed if it did; it runs in the sandbox, in its usual limits."""
    found = sandbox.run(code, limits=sandbox.Limits())
    return "\n".join(filter(None, (found.output.rstrip("\n"), found.problem)))
