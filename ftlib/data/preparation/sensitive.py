"""Personal data and secrets in text, by pattern; what is found is only ever shown masked.

Left out: names and addresses, which no pattern finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

__all__ = ["PII_KINDS", "SECRET_KINDS", "masked", "pii", "secrets"]

PII_KINDS = ("email", "phone", "card", "iban")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_DIGITS = re.compile(r"\d(?:[ \-./()]{0,2}\d){6}")  # seven digits close together: without, nothing below fits
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ \-./]?\(?\d{1,5}\)?){2,6}"  # +49 30 123456
    r"|\(?\d{3}\)?[ \-.]\d{3}[ \-.]\d{4}"  # (202) 555-0100
    r"|0\d{1,4}(?:[ \-/]\d{2,8}){1,4}"  # 030 1234567
    r")(?![\w-])"
)
_DATE = re.compile(r"\d{1,4}[-./ ]\d{1,2}[-./ ]\d{1,4}\Z")
_PHONE_DIGITS = range(7, 16)


@final
@dataclass(frozen=True)
class _Secret:
    """A kind of key: a text that stands in every one of them, and their shape."""

    kind: str
    mark: str
    shape: re.Pattern[str]


_SECRETS = tuple(
    _Secret(kind, mark, re.compile(shape))
    for kind, mark, shape in (
        ("aws", "AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
        ("github", "gh", r"\bgh[opsur]_[A-Za-z0-9]{30,}\b"),
        ("github", "github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{30,}"),
        ("gitlab", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
        ("google", "AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
        ("huggingface", "hf_", r"\bhf_[A-Za-z0-9]{30,}\b"),
        ("jwt", "eyJ", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
        ("openai", "sk-", r"\bsk-[A-Za-z0-9_-]{20,}"),
        ("private_key", "PRIVATE KEY", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
        ("slack", "xox", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
        ("stripe", "k_live_", r"\b[rs]k_live_[A-Za-z0-9]{16,}"),
    )
)
_ASSIGNED = re.compile(
    r"(?i)\b(?:api[ _-]?key|secret|token|passw(?:or)?d)\b[\"']?\s*[:=]\s*[\"']?"
    r"(?=[^\s\"']*\d)(?=[^\s\"']*[A-Za-z])([^\s\"',;]{8,})"
)
SECRET_KINDS = tuple(dict.fromkeys([*(secret.kind for secret in _SECRETS), "assigned"]))


def pii(text: str) -> Iterator[tuple[str, str]]:
    """(kind, value) of personal data in a text; kinds are those of `PII_KINDS`.

    Example:
        >>> list(pii("Ann <ann@example.com>, card 4111 1111 1111 1111, on 2024-01-15"))
        [('email', 'ann@example.com'), ('card', '4111 1111 1111 1111')]
    """
    if "@" in text:
        for found in _EMAIL.finditer(text):
            yield "email", found[0]
    if _DIGITS.search(text) is None:
        return
    taken = text
    for kind, shape, fits in _NUMBERS:
        for found in shape.finditer(taken):
            if fits(found[0]):
                yield kind, found[0]
                # Digits of one number are not parts of another.
                taken = taken[: found.start()] + "\0" * len(found[0]) + taken[found.end() :]


def secrets(text: str) -> Iterator[tuple[str, str]]:
    """(kind, value) of keys and passwords in a text; kinds are those of `SECRET_KINDS`."""
    for secret in _SECRETS:
        if secret.mark in text:
            for found in secret.shape.finditer(text):
                yield secret.kind, found[0]
    if ":" in text or "=" in text:
        for found in _ASSIGNED.finditer(text):
            yield "assigned", found[1]


def masked(value: str) -> str:
    """A value as reports may show it.

    Example:
        >>> masked("ann@example.com")
        'a***'
    """
    return value[:1] + "***"


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if char.isdecimal()]


def _is_card(text: str) -> bool:
    """Luhn's checksum, and no row of one digit."""
    digits = _digits(text)
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 7064: letters as numbers, the first four characters moved to the end, modulo 97 is 1."""
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34 or not plain.isascii():
        return False
    return int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    return len(_digits(text)) in _PHONE_DIGITS and not _DATE.match(text)


_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("card", _CARD, _is_card),
    ("iban", _IBAN, _is_iban),
    ("phone", _PHONE, _is_phone),
)
