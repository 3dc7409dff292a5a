"""A chat template's first rendering, in a process of its own that may use little time and memory.

A template is a program that came with somebody's model. The sandbox keeps it from the system, not from
looping for hours or from filling memory, and what runs in this process cannot be stopped. So a template that
was not seen before is first rendered by `ftlib.data.trial_child`, on the messages at hand and on a
conversation of four turns. Errors of the template's own are left to the rendering that follows.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["SECONDS", "try_template"]

SECONDS = 2  # of processor time
MEGABYTES = 512
CHARACTERS = 1 << 20  # of one rendering, beside sixteen times what was given to it
_PATIENCE = 60.0  # seconds by the clock, for a child on a busy machine
_ENDED = [-each for each in signal.Signals if each.name in ("SIGKILL", "SIGXCPU")]  # by its limit of time
_CRASHED = 256  # exit codes of a crash: from here on Windows, negative elsewhere
_CHILD = Path(__file__).with_name("trial_child.py")
_TURNS = tuple({"role": role, "content": "a"} for role in ("user", "assistant") * 2)
_OUTCOMES = {
    "good": None,
    "long": f"it writes more than {CHARACTERS:,} characters beside what a first conversation says",
    "memory": f"it needs more than {MEGABYTES} MB of memory for a first conversation",
}
_TOO_SLOW = f"it runs for more than {SECONDS} s on a first conversation"

_UNTRIED = "chat template: rendered without a trial in a process of its own"

_log = logging.getLogger(__name__)
_found: dict[str, str | None] = {}  # template -> what is wrong with it


def try_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, Any],
    tools: Sequence[Any] | None,
) -> str | None:
    """Why this template must not be rendered here; `None` for a good one, and for one seen before.

    Args:
        template: its text.
        messages: the first conversation it is to render.
        special: the special tokens, by the names that templates know.
        tools: as they go to the template.
    """
    if template not in _found:
        given = {
            "path": sys.path,
            "template": template,
            "conversations": [list(messages), list(_TURNS)],
            "variables": {**special, "tools": tools},
            "limits": {"seconds": SECONDS, "megabytes": MEGABYTES, "characters": CHARACTERS},
        }
        _found[template] = _outcome(json.dumps(given, default=str, skipkeys=True))
    return _found[template]


def _outcome(given: str) -> str | None:
    """What the child says, or what became of it."""
    # Nothing but our own file is run; the template is data on its standard input.
    command = [sys.executable or "", "-P", str(_CHILD)]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=given.encode(), capture_output=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return _TOO_SLOW
    except OSError as error:  # a host that may start no process
        _log.warning("%s: no process could be started: %s.", _UNTRIED, error)
        return None
    said = done.stdout.decode(errors="replace").strip()
    if said in _OUTCOMES:
        return _OUTCOMES[said]
    if done.returncode in _ENDED:
        return _TOO_SLOW
    if 0 <= done.returncode < _CRASHED:  # a host program that is no Python, say
        said = done.stderr.decode(errors="replace")[-200:]
        _log.warning("%s: %s ended with %d: %r.", _UNTRIED, sys.executable, done.returncode, said)
        return None
    return f"it ends the process that renders it (exit code {done.returncode})"
