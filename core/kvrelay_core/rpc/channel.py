"""Transport options, alike for every channel and server, and how a channel is opened.

A server that stops answering is noticed by its caller in about 0.9 s: a ping every 500 ms, lost after 400 ms
(PROTOCOL B3), and so is a caller that goes silent, in 0.5 to 1 s. Without the ping timeout it takes a minute.
"""

from __future__ import annotations

from pathlib import Path

import grpc
from msgspec import Struct

MAX_MESSAGE_BYTES = 32 * 2**20

# The caller pings; a server only once nothing has come for longer than that, which is when the caller is gone. Both
# would ping at twice the rate, and every ping wakes gRPC's pool of threads, most of what an idle process spends.
_CALLER_PING_MS, _SERVER_PING_MS = 500, 600


def _keepalive(ping_ms: int) -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", 400),
        ("grpc.http2.ping_timeout_ms", 400),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
]

# Strikes off: keepalive pings between our own services are wanted, not abuse.
SERVER_OPTIONS = [
    *_keepalive(_SERVER_PING_MS),
    *_LIMITS,
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]
CHANNEL_OPTIONS = [
    *_keepalive(_CALLER_PING_MS),
    *_LIMITS,
    # A worker that is back should be found within what is left of a grace of 2 s, not after gRPC's default back-off
    # of up to 2 minutes. The middle one is in truth how long an attempt to connect may take at least.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 250),
    # Two channels to one address must not share one connection's fate.
    ("grpc.use_local_subchannel_pool", 1),
]


class TlsFiles(Struct, frozen=True):
    """PEM files. With a CA, both sides must present certificates it signed (mTLS)."""

    certificate: Path
    key: Path
    ca: Path

    def server_credentials(self) -> grpc.ServerCredentials:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], self.ca.read_bytes(), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes())


def open_channel(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=CHANNEL_OPTIONS)
