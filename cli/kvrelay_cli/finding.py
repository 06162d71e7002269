"""One line of a report: `ok`, `--` (not there, and not needed) or `BAD` (something will not work)."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class Verdict(StrEnum):
    OK = "ok"
    ABSENT = "--"
    BAD = "BAD"


class Finding(Struct, frozen=True):
    verdict: Verdict
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<4} {self.name:<16} {self.text}"


def ok(name: str, text: str) -> Finding:
    return Finding(Verdict.OK, name, text)


def absent(name: str, text: str) -> Finding:
    return Finding(Verdict.ABSENT, name, text)


def bad(name: str, text: str) -> Finding:
    return Finding(Verdict.BAD, name, text)
