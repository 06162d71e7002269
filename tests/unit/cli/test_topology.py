"""`up` turns its flags into the commands of `kvrelay serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvrelay_cli.commands import serve, up
from kvrelay_cli.ports import choose_ports
from kvrelay_cli.role_process import RoleSpec
from kvrelay_cli.topology import plan_roles, threads_per_worker


def plan(*words: str) -> list[RoleSpec]:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    args = parser.parse_args(["--model", "m", *words])
    ports = list(range(9001, 9001 + args.prefill + args.decode + args.encoder))
    return plan_roles(args, ("kvrelay",), Path("/run/x"), 9000, ports)


def value_after(spec: RoleSpec, flag: str) -> str | None:
    return spec.command[spec.command.index(flag) + 1] if flag in spec.command else None


def test_the_router_knows_every_worker() -> None:
    router, *workers = plan("--prefill", "2", "--decode", "1")
    assert router.command[:3] == ("kvrelay", "serve", "router")
    assert value_after(router, "--prefill") == "127.0.0.1:9001,127.0.0.1:9002"
    assert value_after(router, "--decode") == "127.0.0.1:9003"
    assert [spec.name for spec in workers] == ["prefill-0", "prefill-1", "decode-0"]


def test_workers_get_their_own_port_name_and_folder() -> None:
    prefill, decode = plan()[1:]
    assert [value_after(decode, flag) for flag in ("--worker-id", "--grpc-port", "--run-dir", "--peers")] == [
        "decode-0", "9002", "/run/x/decode-0", "127.0.0.1:9001",
    ]  # fmt: skip
    assert value_after(prefill, "--peers") == "127.0.0.1:9002"


def test_decode_reads_everybody_and_prefill_reads_decode() -> None:
    """Hand-offs, and the KV that the last turn of a conversation left at decode."""
    workers = plan("--prefill", "2", "--decode", "2")[1:]
    assert [value_after(worker, "--peers") for worker in workers] == [
        "127.0.0.1:9003,127.0.0.1:9004",
        "127.0.0.1:9003,127.0.0.1:9004",
        "127.0.0.1:9001,127.0.0.1:9002,127.0.0.1:9004",
        "127.0.0.1:9001,127.0.0.1:9002,127.0.0.1:9003",
    ]


def test_flags_are_passed_on_under_the_same_name_and_only_when_set() -> None:
    router, prefill, decode = plan("--kv-blocks", "40", "--memory-fraction", "0.25", "--placement", "round_robin")
    for worker in (prefill, decode):
        assert value_after(worker, "--kv-blocks") == "40"
        assert value_after(worker, "--memory-fraction") == "0.25"
        assert "--max-num-seqs" not in worker.command
    assert value_after(router, "--placement") == "round_robin"
    assert "--kv-blocks" not in router.command


def test_without_prefill_decode_does_both() -> None:
    router, decode = plan("--prefill", "0", "--allow-insecure")
    assert value_after(router, "--prefill") is None
    assert value_after(router, "--decode") == "127.0.0.1:9001"
    assert value_after(decode, "--peers") is None
    assert "--allow-insecure" in router.command
    assert "--allow-insecure" not in decode.command  # it listens on loopback


def test_encoders_are_known_to_the_router_and_read_by_prefill() -> None:
    router, prefill, decode, *encoders = plan("--encoder", "2", "--embedding-mib", "64")
    assert value_after(router, "--encoder") == "127.0.0.1:9003,127.0.0.1:9004"
    assert value_after(prefill, "--peers") == "127.0.0.1:9002,127.0.0.1:9003,127.0.0.1:9004"
    assert value_after(decode, "--peers") == "127.0.0.1:9001"
    assert [(spec.name, value_after(spec, "--peers")) for spec in encoders] == [
        ("encoder-0", None),
        ("encoder-1", None),
    ]
    assert value_after(encoders[0], "--embedding-mib") == value_after(prefill, "--embedding-mib") == "64"


def test_devices_are_dealt_out_in_turn() -> None:
    specs = plan("--device", "cuda", "--prefill", "3", "--prefill-devices", "0,2", "--decode-devices", "1")
    assert [value_after(spec, "--device-index") for spec in specs[1:]] == ["0", "2", "0", "1"]


def test_serve_takes_every_command_that_up_makes() -> None:
    """The two parsers cannot drift apart."""
    words = (
        "--block-tokens 16 --kv-blocks 40 --memory-fraction 0.5 --max-model-len 100 --max-num-seqs 4 --dtype float32 "
        "--max-batched-tokens 64 --threads-per-worker 1 --connector shm --placement least_load --log-level debug "
        "--tls-cert c --tls-key k --tls-ca a --allow-insecure "
        "--served-model-name name --api-key-file keys --media-url-hosts pics.test,*.cdn.test:8443 "
        "--device cuda --prefill-devices 0 --decode-devices 1 --encoder 1 --encoder-devices 2"
        " --embedding-mib 64 --max-patches 100 --decode-threads 3 --sliding-blocks 12"
        " --host-cache 1GiB --disk-cache d:2.5GiB --redis-url redis://h:1 --redis-password-file p --cache-secret-file s"
        " --cache-codec zstd --cache-policy s3-fifo"
    )
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    for spec in plan(*words.split()):
        args = parser.parse_args(spec.command[2:])
        assert args.role == spec.role
        assert args.model == "m"
        if args.role == "router":
            assert args.media_url_hosts == ("pics.test", "*.cdn.test:8443")


def test_threads_are_an_equal_share_of_the_cores() -> None:
    assert threads_per_worker(1) >= threads_per_worker(2) >= 1
    assert threads_per_worker(10_000) == 1


def test_chosen_ports_differ_and_are_not_taken_for_outgoing_connections() -> None:
    ports = choose_ports("127.0.0.1", 20)
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert len(set(ports)) == 20
    if first > 11_000:
        assert not [port for port in ports if first <= port <= last]


def test_no_port_on_a_foreign_address() -> None:
    with pytest.raises(Exception, match="is it an address of this machine"):
        choose_ports("192.0.2.1", 1)
