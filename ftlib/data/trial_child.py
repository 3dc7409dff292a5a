"""Run by path, never imported: renders what `ftlib.data.trial` sends, within limits, and says how it went.

It knows Jinja alone, since importing more would cost seconds. Its sandbox is that of transformers, with what
templates find there; errors of the template count as good, for they show again where they can be reported.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> str:
    """``good``, ``long`` or ``memory``; a template that runs too long ends this process."""
    given = json.load(sys.stdin)
    sys.path[:] = given["path"]  # wherever the parent has found Jinja
    environment = _environment()
    limits = given["limits"]
    _limit(limits["seconds"], limits["megabytes"])
    for messages in given["conversations"]:
        variables = {**given["variables"], "messages": messages}
        most = limits["characters"] + 16 * len(json.dumps(variables))
        for asked in (False, True):
            try:
                template = environment.from_string(given["template"])
                if _is_long(template, most, {**variables, "add_generation_prompt": asked}):
                    return "long"
            except MemoryError:
                return "memory"
            except Exception:  # noqa: BLE001, S112  the rendering that counts will raise it again
                continue
    return "good"


def _is_long(template: Any, most: int, variables: dict[str, Any]) -> bool:
    """Whether a rendering has more than `most` characters."""
    length = 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > most:
            return True
    return False


def _environment() -> Any:
    """A sandbox as templates expect it."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks, without their effect."""

        tags = {"generation"}  # noqa: RUF012  the type of this attribute is Jinja's

        def parse(self, parser: Any) -> Any:
            """The statements between the marks."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **given: json.dumps(
        value, **{"ensure_ascii": False, **given}
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    return environment


def _limit(seconds: int, megabytes: int) -> None:
    """Bound processor time and memory, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the parent ends what takes too long by the clock
        return
    spent = int(time.process_time()) + 1
    _lower(resource, resource.RLIMIT_CPU, spent + seconds)
    _lower(resource, resource.RLIMIT_AS, megabytes << 20)


def _lower(resource: Any, kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(kind, (allowed, allowed))
    except (OSError, ValueError):  # a system without this limit
        return


if __name__ == "__main__":
    sys.stdout.write(main())
