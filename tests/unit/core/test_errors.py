from __future__ import annotations

import grpc
import pytest

from kvrelay_core import errors
from kvrelay_core.error_info import error_of, info_of
from kvrelay_core.errors import KvRelayError, PoolExhaustedError, StaleTicketError, error_from
from kvrelay_core.rpc.status import error_from_detail, error_to_detail


def all_error_classes() -> list[type[KvRelayError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, KvRelayError)]


@pytest.mark.parametrize("cls", all_error_classes())
def test_every_class_keeps_its_type_message_and_metadata_across_borders(cls: type[KvRelayError]) -> None:
    error = cls("what to do", blocks=3)
    for copy in (error_of(info_of(error)), error_from_detail(error_to_detail(error))):
        assert type(copy) is cls
        assert copy.message == "what to do"
        assert copy.metadata == {"blocks": "3"}


@pytest.mark.parametrize("cls", all_error_classes())
def test_every_class_names_a_grpc_status_and_stands_in_the_tree(cls: type[KvRelayError]) -> None:
    assert cls.status in grpc.StatusCode.__members__
    assert errors.__doc__ is not None
    if cls is not KvRelayError:
        (line,) = [line for line in errors.__doc__.splitlines() if f"─ {cls.__name__} " in line]
        assert cls.status in line


def test_an_unknown_class_falls_back_to_its_status() -> None:
    assert type(error_from("OfALaterRelease", "DATA_LOSS", "m")) is StaleTicketError
    assert type(error_from("OfALaterRelease", "UNKNOWN", "m")) is errors.InternalError
    assert issubclass(PoolExhaustedError, errors.OverloadedError)
