"""Real Redis servers on free ports of loopback, that a test starts, kills and starts again.

    with RedisServer(directory) as server: ...                     one server; password, ACL user, TLS by arguments
    with RedisCluster(directory) as cluster: ...                   three masters
    with RedisSentinel(directory, server) as sentinel: ...         one Sentinel that watches `server`

Nothing is kept on disk unless asked for, and no password is in a command line. Servers die with their parent.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from certificates import CertificateAuthority
from redis import Redis

START_DEADLINE_S = 20.0
_POLL_S = 0.01
_TIED = ("setpriv", "--pdeathsig", "KILL")  # of util-linux; the server takes its place
_PORTS = 20_000, 32_000


def wait_until(condition: Any, what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """For what a server does not say by itself."""
    until_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)


class RedisProcess:
    """`lines` are those of its configuration; port and logging are added."""

    def __init__(self, directory: Path, lines: list[str], *, is_sentinel: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self._lines = lines
        self._is_sentinel = is_sentinel
        self._process: subprocess.Popen[str] | None = None
        self._drain: threading.Thread | None = None

    def start(self) -> None:
        """Returns when it takes connections. The port stays the same over restarts."""
        assert self._process is None
        path = self.directory / f"redis-{self.port}.conf"
        path.write_text(
            "\n".join([*self._port_lines(), "bind 127.0.0.1", f"dir {self.directory}", *self._lines]) + "\n"
        )
        path.chmod(0o600)
        # Not by a `preexec_fn`: that forks a process in which gRPC has threads, whose handlers may hang the child.
        self._process = subprocess.Popen(
            [*_TIED, "redis-server", str(path), *(["--sentinel"] if self._is_sentinel else [])],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._await_ready()

    def kill(self) -> None:
        """As a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """As an operator does."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        self.kill()
        self.start()

    def freeze(self) -> None:
        """It takes connections, or rather the kernel does, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()

    def _port_lines(self) -> list[str]:
        return [f"port {self.port}"]

    def _await_ready(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        output = self._process.stdout
        seen: list[str] = []
        sign = "monitor master" if self._is_sentinel else "Ready to accept connections"
        watchdog = threading.Timer(START_DEADLINE_S, self._process.kill)
        watchdog.start()
        for line in output:
            seen.append(line)
            if sign in line:
                break
        watchdog.cancel()
        watchdog.join()
        assert seen and sign in seen[-1], f"redis-server did not start:\n{''.join(seen)}"
        # A daemon: where nobody ended the server, the tests still end, and the server with them.
        self._drain = threading.Thread(
            target=lambda: [None for _ in output], name=f"redis-log-{self.port}", daemon=True
        )
        self._drain.start()

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None and self._process.stdout is not None and self._drain is not None
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)
        self._process.wait(START_DEADLINE_S)
        self._drain.join()
        self._process.stdout.close()
        self._process = None


class RedisServer(RedisProcess):
    """With `user`, the default user is off and this one may do only what a tier does, with keys of tiers. With `tls`,
    it has no other port; clients need no certificate. `lines` are more of its configuration: `maxmemory 8mb`."""

    def __init__(
        self,
        directory: Path,
        *lines: str,
        password: str = "",
        user: str = "",
        tls: CertificateAuthority | None = None,
        is_durable: bool = False,
    ) -> None:
        self.password, self.user, self.ca = password, user, tls
        self.files = None if tls is None else tls.issue(f"redis-{len(list(directory.parent.iterdir()))}")
        every = ["save ''" if not is_durable else "appendonly yes", "appendfsync always", "repl-diskless-sync-delay 0"]
        if user:
            rules = "~kvr1:* +get +set +exists +unlink +scan +dbsize +info +cluster|slots"
            every += ["user default off", f"user {user} on >{password} {rules}", f"user admin on >{password} ~* +@all"]
        elif password:
            every += [f"requirepass {password}", f"masterauth {password}"]
        super().__init__(directory, [*every, *lines])

    @property
    def login(self) -> str:
        """As it is written in URLs."""
        return f"{self.user}:{quote(self.password, safe='')}@" if self.password else ""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """With credentials and files, for whoever is to be let in."""
        return self.url_at(self.address)

    def url_at(self, address: str) -> str:
        """For whoever comes by a proxy."""
        files = "" if self.ca is None else f"?ssl_ca_certs={self.ca.certificate}"
        return f"redis{'s' if self.ca else ''}://{self.login}{address}{files}"

    def do(self, *words: str | bytes | int | float) -> Any:
        """The server's answer to a command, as an administrator."""
        with self.client() as client:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]

    @contextmanager
    def client(self) -> Iterator[Redis]:
        """An administrator's."""
        options: dict[str, Any] = {"protocol": 2, "password": self.password or None}
        if self.user:
            options["username"] = "admin"
        if self.ca is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(self.ca.certificate)}
        client = Redis("127.0.0.1", self.port, **options)
        try:
            yield client
        finally:
            client.close()

    def _port_lines(self) -> list[str]:
        if self.files is None:
            return super()._port_lines()
        files = f"tls-cert-file {self.files.certificate}", f"tls-key-file {self.files.key}"
        return ["port 0", f"tls-port {self.port}", *files, f"tls-ca-cert-file {self.files.ca}", "tls-auth-clients no"]


class RedisSentinel(RedisProcess):
    """Watches one master, alone, and makes its replica the master within about two seconds of its death."""

    def __init__(self, directory: Path, master: RedisServer, service: str = "tiers") -> None:
        self.service = service
        self._login = master.login
        lines = [
            f"sentinel monitor {service} 127.0.0.1 {master.port} 1",
            f"sentinel down-after-milliseconds {service} 300",
            f"sentinel failover-timeout {service} 3000",
            *([f"sentinel auth-pass {service} {master.password}"] if master.password else []),
        ]
        super().__init__(directory, lines, is_sentinel=True)

    @property
    def url(self) -> str:
        return f"redis-sentinel://{self._login}127.0.0.1:{self.port}/{self.service}"

    def do(self, *words: str | bytes | int | float) -> Any:
        client = Redis("127.0.0.1", self.port, protocol=2)
        try:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]
        finally:
            client.close()


class RedisCluster:
    """Masters that share the slots evenly, without replicas. It takes two seconds to start, whatever one does."""

    def __init__(self, directory: Path, *, password: str = "", lines: tuple[str, ...] = ()) -> None:
        self.servers = [
            RedisServer(
                directory / f"node{index}", "cluster-enabled yes", f"cluster-config-file nodes-{index}.conf",
                f"cluster-port {free_port()}", "cluster-node-timeout 2000", *lines, password=password,
            )
            for index in range(3)
        ]  # fmt: skip
        self._started = ExitStack()

    @property
    def url(self) -> str:
        return f"redis-cluster://{self.servers[0].login}{','.join(server.address for server in self.servers)}"

    def owner_of(self, key: str) -> RedisServer:
        slot = self.slot_of(key)
        return next(server for server in self.servers if slot in self._slots_of(server))

    def slot_of(self, key: str) -> int:
        return int(self.servers[0].do("CLUSTER", "KEYSLOT", key))

    def id_of(self, server: RedisServer) -> str:
        return str(server.do("CLUSTER", "MYID").decode())

    def open_slot(self, key: str, to: RedisServer) -> None:
        """The slot starts to move, and the key goes first: until `close_slot` its owner says ASK."""
        slot, owner = self.slot_of(key), self.owner_of(key)
        to.do("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(owner))
        owner.do("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        auth = ["AUTH", owner.password] if owner.password else []
        owner.do("MIGRATE", "127.0.0.1", to.port, key, 0, 5000, *auth)

    def close_slot(self, key: str, to: RedisServer) -> None:
        """The slot has moved: whoever asks the old owner is told MOVED."""
        slot = self.slot_of(key)
        for server in (to, *self.servers):
            server.do("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))

    def __enter__(self) -> RedisCluster:
        with ExitStack() as started:
            for server in self.servers:
                started.enter_context(server)
            self._share_slots()
            self.await_ready()
            self._started = started.pop_all()
        return self

    def await_ready(self) -> None:
        """After a server of it was started anew, too."""
        wait_until(lambda: all(map(self._is_ready, self.servers)), "the servers make one cluster")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._started.close()

    def _share_slots(self) -> None:
        share = 16384 // len(self.servers) + 1
        for index, server in enumerate(self.servers):
            server.do("CLUSTER", "ADDSLOTSRANGE", index * share, min(16383, (index + 1) * share - 1))
            server.do("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        first, *others = self.servers
        bus_port = int(first.do("CONFIG", "GET", "cluster-port")[1])
        for server in others:
            server.do("CLUSTER", "MEET", "127.0.0.1", first.port, bus_port)

    def _is_ready(self, server: RedisServer) -> bool:
        is_ok = b"cluster_state:ok" in server.do("CLUSTER", "INFO")
        masters = {master[1] for _, _, master, *_ in server.do("CLUSTER", "SLOTS")}
        return is_ok and len(masters) == len(self.servers)

    def _slots_of(self, server: RedisServer) -> set[int]:
        found: set[int] = set()
        for first, last, master, *_ in server.do("CLUSTER", "SLOTS"):
            if master[1] == server.port:
                found.update(range(first, last + 1))
        return found


def free_port() -> int:
    """Not one that the kernel gives to outgoing connections: it is to be free again when a server is started anew."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
