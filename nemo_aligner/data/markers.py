# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens as a chat template, so that whoever asks a model finds the text that marked its turns in training."""

import json

from nemo_aligner.data.config import ChatPromptTokens


def marker_template(tokens: ChatPromptTokens, *, starts_with_bos: bool) -> str:
    """A Jinja chat template that writes a conversation between prompt tokens.

    A conversation that the assistant ends is followed by ``turn_start``, which is where a model stops.
    """
    tokens = tokens.unescaped()
    named = " ".join(
        f"{{%- set {name} = {json.dumps(text)} %}}"
        for name, text in (
            ("start_of_system", f"{tokens.system_turn_start}System{tokens.end_of_name}"),
            ("start_of_turn", tokens.turn_start),
            ("end_of_name", tokens.end_of_name),
            ("end_of_turn", tokens.end_of_turn),
        )
    )
    bos = "{{- bos_token }}" if starts_with_bos else ""
    return (
        f"{named}{bos}"
        "{%- set led = messages[0]['role'] == 'system' %}"
        "{{- start_of_system + (messages[0]['content'] if led else '') + end_of_turn }}"
        "{%- for message in (messages[1:] if led else messages) %}"
        "{%- if message['role'] == 'system' %}"
        "{{- raise_exception('the system message comes first') }}{%- endif %}"
        "{%- set name = {'user': 'User', 'assistant': 'Assistant'}.get(message['role'], message['role']) %}"
        "{{- start_of_turn + name + end_of_name + message['content'] + end_of_turn }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- start_of_turn + 'Assistant' + end_of_name }}"
        "{%- elif messages[-1]['role'] == 'assistant' %}{{- start_of_turn }}{%- endif %}"
    )


def is_usual_template(template: str) -> bool:
    """True if a template is that of the prompt tokens that are used where none are given."""
    return template in (marker_template(ChatPromptTokens(), starts_with_bos=bos) for bos in (False, True))
