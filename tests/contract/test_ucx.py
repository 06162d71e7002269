"""What is particular to the ucx connector: its library, its offers, its gate, and that it rests."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from connector_benches import Shapes
from handoff_sides import ADDRESS, LAYOUT, MODEL, make_memory, wait_until
from msgspec.structs import replace
from ucx_bench import UcxBench

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, LeaseExpiredError, TransferError, UnsupportedError
from kvrelay_transfer.connectors import ucx_link, ucx_reader, ucx_source
from kvrelay_transfer.connectors.base import BlockRead, BlockSlices, ConnectorOffer, PeerInfo, SliceShape, TransferState
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.connectors.ucx_library import UcxLibrary
from kvrelay_transfer.connectors.ucx_messages import UcxEndpoint, make_tag, split_tag
from kvrelay_transfer.connectors.ucx_worker import UcxPeer, UcxWorker


@pytest.fixture
def bench() -> Iterator[UcxBench]:
    bench = UcxBench(Shapes())
    yield bench
    bench.close()


def test_the_import_leaves_the_environment_as_it_was() -> None:
    """In a process of its own: an import takes place once."""
    program = (
        "import os\n"
        "os.environ['UCX_MAX_RNDV_RAILS'] = '3'\n"
        "from kvrelay_transfer.connectors import registry, ucx\n"
        "import sys\n"
        "assert 'ucxx' not in sys.modules\n"
        "ucx.UcxLibrary.load().make_worker('cpu')\n"
        "assert 'ucxx' in sys.modules\n"
        "print({name: value for name, value in os.environ.items() if name.startswith('UCX_')})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{'UCX_MAX_RNDV_RAILS': '3'}\n"
    assert "WARN" not in done.stdout + done.stderr


def test_a_missing_library_is_a_config_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvrelay\[ucx\]'"):
        UcxLibrary.load()


def test_a_transport_that_does_not_exist_is_a_config_error() -> None:
    memory = make_memory()
    with pytest.raises(ConfigError, match="UCX_TLS"):
        UcxConnector(memory, MonotonicClock(), options={"TLS": "pigeon"})
    memory.close()


@pytest.mark.parametrize("endpoint", [b"", b"\xff\xff", b"garbage", msgspec.msgpack.encode((b"x", b"e" * 16, 3))])
def test_an_endpoint_that_it_cannot_read_is_refused(bench: UcxBench, endpoint: bytes) -> None:
    peer = PeerInfo(ADDRESS, b"e" * 16, MODEL, LAYOUT, ())
    with pytest.raises(TransferError, match="cannot read"):
        bench.connector.connect(peer, ConnectorOffer("ucx", endpoint))


def test_a_worker_address_that_is_none_is_refused(bench: UcxBench) -> None:
    endpoint = msgspec.msgpack.decode(bench.offer.endpoint, type=UcxEndpoint)
    bad = ConnectorOffer("ucx", msgspec.msgpack.encode(replace(endpoint, worker_address=b"")))
    with pytest.raises(TransferError):
        bench.connector.connect(bench.side.peer(bad), bad)


@pytest.mark.parametrize("change", [{"engine_epoch": b"another epoch..."}, {"layout": replace(LAYOUT, head_dim=16)}])
def test_a_peer_of_another_start_or_layout_is_refused(bench: UcxBench, change: dict[str, object]) -> None:
    with pytest.raises(TransferError, match="another"):
        bench.connector.connect(replace(bench.side.peer(bench.offer), **change), bench.offer)


def test_slices_are_refused(bench: UcxBench) -> None:
    slices = BlockSlices(SliceShape(1, 1, 64, 0, 0, 0, 0), (0,), (0,))
    transfer = bench.link.read(BlockRead(bench.ticket, 0, bench.blocks[:1], (1,), slices))
    assert transfer.poll() is TransferState.FAILED
    assert isinstance(transfer.error, UnsupportedError)


def test_without_an_open_ticket_nothing_is_sent(bench: UcxBench) -> None:
    bench.source_connector.serve(None)
    refused = bench.link.read(bench.request(bench.blocks[:1], (1,)))
    bench.finish(refused)
    assert refused.poll() is TransferState.FAILED
    assert isinstance(refused.error, LeaseExpiredError)
    assert not bench.memory.block_rows.any()
    bench.source_connector.serve(bench.side.source)
    served = bench.link.read(bench.request(bench.blocks[:1], (1,)))
    bench.finish(served)
    assert served.poll() is TransferState.DONE


def test_a_reader_that_takes_nothing_loses_its_connection(bench: UcxBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time its chunks at the source are free for others; the reader hears of it."""
    monkeypatch.setattr(ucx_reader.UcxReader, "take_chunk", lambda reader, arrival: None)
    monkeypatch.setattr(bench.reader_connector.worker._handlers, "on_chunk", lambda arrival: None)
    monkeypatch.setattr(ucx_reader, "RECEIVE_DEADLINE_S", 1e9)
    source = bench.source_connector.source
    bench.side.overwrite(1)
    transfer = bench.link.read(bench.request(bench.blocks, tuple(range(1, 16))))
    wait_until(lambda: source.num_chunks_taken > 0)
    bench.clock.advance(ucx_source.SEND_DEADLINE_S)
    wait_until(lambda: source.num_chunks_taken + source.num_readers == 0)
    bench.finish(transfer)
    assert transfer.poll() is not TransferState.DONE


def test_a_probe_that_is_not_answered_is_over_in_time(bench: UcxBench) -> None:
    bench.stall()
    link = bench.connector.connect(bench.side.peer(bench.offer), bench.offer)
    assert link.probed_gb_per_s() is None
    bench.clock.advance(ucx_link.PROBE_S)
    assert link.probed_gb_per_s() == 0.0
    bench.resume()
    link.close()


def test_a_connected_pair_rests() -> None:
    """Under 0.4 % of a core for both sides together, keepalives included."""
    others = set(os.listdir("/proc/self/task"))
    bench = UcxBench(Shapes())
    wait_until(lambda: bench.link.probed_gb_per_s() is not None)
    ours = set(os.listdir("/proc/self/task")) - others
    begun_s, used_s = time.monotonic(), sum(map(cpu_seconds_of_thread, ours))
    time.sleep(1.0)
    share = (sum(map(cpu_seconds_of_thread, ours)) - used_s) / (time.monotonic() - begun_s)
    bench.close()
    assert ours and share < 0.004


def cpu_seconds_of_thread(thread: str) -> float:
    running_ns, *_ = Path("/proc/self/task", thread, "schedstat").read_text().split()
    return int(running_ns) / 1e9


def test_no_thread_and_nothing_of_ours_is_left() -> None:
    """Descriptors are not counted: of about every fifth pair ucxx keeps the workers, see ADR 0013."""

    def count() -> tuple[int, int]:
        gc.collect()
        ours = [found for found in gc.get_objects() if type(found) in (UcxWorker, UcxPeer, ucx_link.UcxLink)]
        return len(ours), len(os.listdir("/proc/self/task"))

    before = count()
    UcxBench(Shapes()).close()
    assert count() == before


def test_tags_keep_what_they_are_made_of() -> None:
    for parts in ((1, 0, 0), (3, (1 << 44) - 1, (1 << 16) - 1), (2, 12345, 7)):
        assert split_tag(make_tag(*parts)) == parts
        assert make_tag(*parts) < 1 << 64
