# SPDX-License-Identifier: Apache-2.0
"""The command ``nemo-aligner``: every script by a short name, its usual settings too. Imports no torch.

A script ``train_gpt_NAME.py`` is the command NAME; what a script can do, and its settings, are the script's own.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nemo_aligner
from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import USER_ERROR_CODE, run_cli
from nemo_aligner.parallel.ranks import discover, speaks

# What a script's file name does not say.
IRREGULAR = {
    "rm": "train_reward_model.py",
    "ppo": "run_ppo.py",
    "serve": "serve_reward_model.py",
    "critic": "serve_ppo_critic.py",
    "generate": "generate.py",
    "evaluate": "evaluate.py",
    "chat": "generate.py",
    "import": "import_hf.py",
    "export": "export_hf.py",
}
OWN = {
    "config": "config COMMAND [SETTING ...]: print all settings of a command as YAML, with their meanings.",
    "env": "Versions and hardware, for a bug report.",
    "chat": "A conversation at the terminal, or with what stdin says, line by line.",
}
_USAGE = """Usage: nemo-aligner COMMAND [SETTING=VALUE ...] [--config FILE.yaml]
       nemo-aligner COMMAND --help    (its settings by their short names)

{commands}

A first fine-tune:  nemo-aligner sft model=FOLDER_OR_HUB_ID data=rows.jsonl out=results
"""


def main() -> None:
    """Run the command line."""
    try:
        run = _prepare(sys.argv[1:])
    except UserError as error:
        if speaks(discover()):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_CODE)
    run()


def find_commands() -> dict[str, Path]:
    """{command: its script}, in a source checkout and in an installed wheel."""
    package = Path(nemo_aligner.__file__).parent
    folders = (package / "scripts", package.parent / "examples/nlp/gpt")
    folder = next(folder for folder in folders if folder.is_dir())
    regular = {path.stem.removeprefix("train_gpt_"): path for path in sorted(folder.glob("train_gpt_*.py"))}
    return regular | {name: folder / file for name, file in IRREGULAR.items()}


def _prepare(words: Sequence[str]) -> Callable[[], object]:
    """Return the call that the words ask for.

    Raises:
        UserError: there is no such command, or no such setting.
    """
    commands, asks_help = find_commands(), bool({"-h", "--help"} & set(words))
    name, *rest = words or ["--help"]
    shows = name == "config"
    if shows and not asks_help:
        name, *rest = rest or [""]
    match name:
        case "-h" | "--help" | "help" | "config":
            return lambda: sys.stdout.write(_usage(commands))
        case "--version":
            return lambda: sys.stdout.write(f"nemo-aligner {nemo_aligner.__version__}\n")
        case "env":
            from nemo_aligner.launch.environment import report

            return lambda: sys.stdout.write(report())
    if name not in commands:
        near = difflib.get_close_matches(name, [*commands, *OWN], n=1)
        known = f"use one of {', '.join(sorted({*commands, *OWN}))}"
        raise UserError(f"there is no command {name!r}", fix=f"did you mean {near[0]}?" if near else known)
    script = commands[name]
    if asks_help:
        return lambda: sys.stdout.write(_help(name, script))
    entry = load_script(script)
    if shows:
        return _shown(name, entry, rest)
    from nemo_aligner.launch.script import Script

    if isinstance(entry, Script):
        from nemo_aligner.launch.words import full_words

        sys.argv = [str(script), *full_words(rest, entry.kind)]
        return entry
    if name == "ppo":
        from nemo_aligner.launch.ppo_jobs import words_of_jobs

        rest = words_of_jobs(rest, lambda file: load_script(script.with_name(file)).kind)
    sys.argv = [str(script), *rest]
    return lambda: run_cli(entry)


def load_script(path: Path) -> Any:  # noqa: ANN401 - a Script, or a tool's function
    """The main of a script."""
    spec = importlib.util.spec_from_file_location(f"nemo_aligner_{path.stem}", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and inspect look for it
    spec.loader.exec_module(module)
    return module.main


def _shown(name: str, entry: Any, words: Sequence[str]) -> Callable[[], object]:  # noqa: ANN401
    from nemo_aligner.config.explained import explain
    from nemo_aligner.launch.script import Script, compose
    from nemo_aligner.launch.words import full_words

    if not isinstance(entry, Script):
        raise UserError(
            f"{name} has no settings of its own", fix=f"nemo-aligner {name} --help says what it takes"
        )
    config = compose(entry, full_words(words, entry.kind))
    return lambda: sys.stdout.write(explain(config, entry.kind))


def _usage(commands: dict[str, Path]) -> str:
    listed = {name: OWN.get(name) or _doc(path).partition("\n")[0] for name, path in commands.items()} | OWN
    return _USAGE.format(commands="\n".join(f"  {name:<12} {text}" for name, text in listed.items()))


def _doc(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def _help(name: str, script: Path) -> str:
    """The help of a script: its purpose, and the short names of its settings."""
    from nemo_aligner.config.explained import meaning_of
    from nemo_aligner.config.short_names import command_defaults, short_names
    from nemo_aligner.launch.script import Script

    main = load_script(script)
    if not isinstance(main, Script):
        return f"{_doc(script)}\n"
    kind, (what, *_) = main.kind, _doc(script).split("\n\n")
    names = short_names(kind)
    lines = [
        f"nemo-aligner {name} SETTING=VALUE ...",
        "",
        what,
        "",
        "Short names, and the keys that they stand for:",
    ]
    for short, key in names.items():
        lines += [f"  {short:<17} {key}", f"{'':<20}{meaning_of(kind, key)}"]
    if defaults := command_defaults(kind):
        lines += ["", "Defaults of this command that the script alone does not have:"]
        lines += [f"  {key}={value}" for key, value in defaults.items()]
    return "\n".join([*lines, "", f"All settings, with their meanings: nemo-aligner config {name}", ""])
