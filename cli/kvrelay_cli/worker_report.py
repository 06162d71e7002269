"""`kvrelay doctor --target`: what a running worker says of itself, by the calls that every worker answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from kvrelay.v1 import inference_pb2, worker_pb2
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from kvrelay_cli.table import lines_of
from kvrelay_cli.tier_report import tier_lines
from kvrelay_core.errors import ConfigError, KvRelayError
from kvrelay_core.rpc.channel import CHANNEL_OPTIONS, TlsFiles
from kvrelay_core.rpc.status import error_from_rpc

TIMEOUT_S = 5.0
MIB = 2**20


def ask_worker(address: str, tls: TlsFiles | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """{"worker": Describe's answer, "load": one WatchLoad report}, with the names of the proto.

    Raises ConfigError when no worker listens there, and says who does.
    """
    with _open(address, tls) as channel:
        stub = WorkerServiceStub(channel)
        try:
            described = stub.Describe(worker_pb2.DescribeRequest(), timeout=timeout_s)
            reports = stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_s=0), timeout=timeout_s)
            load = next(iter(reports))
            reports.cancel()
        except grpc.RpcError as error:
            raise _explained(error, address, channel, timeout_s) from error
    return {"worker": fields_of(described), "load": fields_of(load)}


def _open(address: str, tls: TlsFiles | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, tls.channel_credentials(), options=CHANNEL_OPTIONS)


def fields_of(message: Any) -> dict[str, Any]:
    """With unset fields; 64-bit numbers as numbers, bytes as hex."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None:
            value = [fields_of(part) for part in value] if field.is_repeated else fields_of(value)
        elif field.is_repeated:
            value = list(value)
        elif isinstance(value, bytes):
            value = value.hex()
        elif field.enum_type is not None:
            value = field.enum_type.values_by_number[value].name.partition("_")[2].lower()
        found[field.name] = value
    return found


def _explained(error: Any, address: str, channel: grpc.Channel, timeout_s: float) -> KvRelayError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        if _is_router(channel, timeout_s):
            return ConfigError(
                f"{address} is a router, and holds no KV; ask its workers, at the addresses that it was given as "
                "--prefill and --decode (its log names them)"
            )
        return ConfigError(f"{address} is no KVRelay worker: it does not know WorkerService")
    return error_from_rpc(error, address)


def _is_router(channel: grpc.Channel, timeout_s: float) -> bool:
    """A refusal for want of a token is a router's answer too."""
    try:
        InferenceServiceStub(channel).GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code is not grpc.StatusCode.UNIMPLEMENTED
    return True


def lines_of_worker(answer: dict[str, Any]) -> Iterator[str]:
    worker, load = answer["worker"], answer["load"]
    reference = worker["worker"]
    yield (
        f"{reference['worker_id']} at {reference['address']}: {worker['role']} worker on {worker['device']}, "
        f"version {worker['software_version']}{', draining' if load['draining'] else ''}"
    )
    yield f"engine epoch {worker['engine_epoch']}, model {worker['model_fingerprint'][:16]}"
    for layout in worker["layouts"]:
        yield (
            f"layout: {layout['dtype']}, {layout['num_layers']} layers, {layout['num_kv_heads']} KV heads of "
            f"{layout['head_dim']}, {layout['block_tokens']} tokens a block"
        )
    for layout in worker["embedding_layouts"]:
        yield (
            f"layout: {layout['dtype']}, embeddings of {layout['hidden_size']}, {layout['block_tokens']} tokens a block"
        )
    if worker["role"] == "encoder":
        yield f"connectors offered: {', '.join(worker['connectors']) or 'none'}"
        yield ""
        yield from encoder_lines(load)
        return
    yield (
        f"limits: {worker['max_model_len']} tokens a request, {worker['max_num_seqs']} sequences, "
        f"{worker['max_batched_tokens']} tokens a step"
    )
    yield f"connectors offered: {', '.join(worker['connectors']) or 'none'}"
    yield ""
    yield (
        f"requests: {load['requests_running']} running, {load['requests_waiting']} waiting, "
        f"{load['requests_waiting_remote_kv']} waiting for KV, {load['tokens_queued']} tokens queued"
    )
    yield (
        f"blocks: {load['blocks_total']}, of these {load['blocks_in_use']} in use, {load['blocks_cached']} cached, "
        f"{load['blocks_pinned']} pinned, {load['blocks_quarantined']} quarantined"
    )
    yield handoff_line(load)
    yield ""
    yield from link_lines(load.get("links", []))
    if load["tiers"]:
        yield ""
        yield f"{load['tier_blocks_loaded']} blocks loaded from tiers"
        yield from tier_lines(load["tiers"])


def encoder_lines(load: dict[str, Any]) -> Iterator[str]:
    yield f"images: {load['requests_waiting']} waiting; {load['steps']} steps of the tower"
    yield (
        f"cache: {load['embedding_items']} images in {load['blocks_cached']} of {load['blocks_total']} blocks, "
        f"{load['blocks_pinned']} pinned by {load['leases']} leases; {load['embedding_hits']} found in it, "
        f"{load['embeddings_evicted']} evicted, {load['expired_leases']} expired leases"
    )


def handoff_line(load: dict[str, Any]) -> str:
    speed = f", {load['handoff_bytes'] / load['handoff_s'] / 1e9:.2f} GB/s" if load["handoff_s"] else ""
    return (
        f"hand-offs: {load['handoff_bytes'] / MIB:.1f} MiB in {load['handoff_s']:.3f} s{speed}; "
        f"{load['leases']} leases, {load['transfers']} transfers now; {load['stale_reads']} stale reads, "
        f"{load['expired_leases']} expired leases, {load['prefix_blocks_pulled']} prefix blocks pulled"
    )


def link_lines(links: list[dict[str, Any]]) -> list[str]:
    """One line for each peer that the worker reads from, and each connector that connected to it."""
    if not links:
        return ["links: none reported; there is one for each peer that KV was read from"]
    header = (
        "peer", "connector", "probe GB/s", "us", "read GB/s", "mean read ms", "reads", "MiB", "spans/read", "failed",
        "stale", "fallbacks", "",
    )  # fmt: skip
    rows = [
        (
            link["peer"], link["connector"], *_probe(link), _read_speed(link), f"{1e3 * link['mean_read_s']:.3f}",
            f"{link['reads']}", f"{link['bytes'] / MIB:.1f}", f"{link['spans'] / max(1, link['reads']):.1f}",
            f"{link['failed_reads']}", f"{link['stale_reads']}", f"{link['fallbacks']}", _remark(link),
        )
        for link in links
    ]  # fmt: skip
    return lines_of(header, rows)


def _read_speed(link: dict[str, Any]) -> str:
    return f"{link['bytes'] / link['reading_s'] / 1e9:.2f}" if link["reading_s"] else "-"


def _probe(link: dict[str, Any]) -> tuple[str, str]:
    """Speed and latency; "-" for what was not measured."""
    gb_per_s, latency_s = link["probed_gb_per_s"], link["probed_latency_s"]
    return f"{gb_per_s:.2f}" if gb_per_s else "-", f"{1e6 * latency_s:.0f}" if latency_s else "-"


def _remark(link: dict[str, Any]) -> str:
    remarks = [] if link["current"] else ["not in use"]
    if link["below_floor"]:
        remarks.append(f"BELOW ITS FLOOR of {link['floor_gb_per_s']:g} GB/s")
    return ", ".join(remarks)
