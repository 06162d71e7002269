"""Errors as messages: between the exception tree and the `ErrorInfo` that crosses process borders."""

from __future__ import annotations

from kvrelay_core.errors import KvRelayError, error_from
from kvrelay_core.request import ErrorInfo


def info_of(error: KvRelayError) -> ErrorInfo:
    return ErrorInfo(error.reason, error.status, error.message, error.metadata)


def error_of(info: ErrorInfo) -> KvRelayError:
    return error_from(info.reason, info.status, info.message, info.metadata)
