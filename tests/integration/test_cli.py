"""The command line against a real cluster: what a user types, sees and gets back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from answers import ask, ask_greedy
from certificates import CertificateAuthority
from checkpoints import reference_greedy
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from oracle import make_prompt
from processes import command_line, descendants

from kvrelay_client import AsyncClient
from kvrelay_core.errors import UnauthenticatedError, UnavailableError
from kvrelay_core.rpc.channel import TlsFiles

pytestmark = [pytest.mark.cluster]

KVRELAY = (sys.executable, "-m", "kvrelay_cli")


def run(*words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([*KVRELAY, *words], capture_output=True, text=True, timeout=timeout_s, env=env, check=False)


async def test_generate_prints_what_the_client_gets(cluster: Cluster) -> None:
    prompt = make_prompt(384, 12, 1)
    words = ["generate", "--target", cluster.target, "--token-ids", ",".join(map(str, prompt))]
    words += ["--max-tokens", "8", "--temperature", "0", "--ignore-eos"]
    answer = json.loads(run(*words, "--json").stdout)
    async with cluster.client() as client:
        expected = await ask(client, token_ids=prompt, max_tokens=8, temperature=0, ignore_eos=True)
    assert answer["token_ids"] == expected.token_ids
    assert answer["text"] == expected.text
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["timing"]["ttft_s"] > 0
    assert run(*words).stdout == f"{expected.text}\n"


def test_doctor_asks_a_running_worker(cluster: Cluster) -> None:
    reader = run("doctor", "--target", cluster.address_of("decode", 0))
    assert reader.returncode == 0, reader.stderr
    assert ": decode worker on cpu (" in reader.stdout.splitlines()[0]
    for line in ("layout: ", "connectors offered: shm", "blocks: ", "hand-offs: ", "peer "):
        assert f"\n{line}" in reader.stdout
    answer = json.loads(run("doctor", "--target", cluster.address_of("decode", 0), "--json").stdout)
    (link,) = [link for link in answer["load"]["links"] if link["peer"] == cluster.address_of("prefill", 0)]
    assert (link["connector"], link["current"]) == ("shm", True)
    assert link["probed_gb_per_s"] > 0 and 0 < link["probed_latency_s"] < 1
    source = json.loads(run("doctor", "--target", cluster.address_of("prefill", 0), "--json").stdout)
    assert source["worker"]["role"] == "prefill"
    assert source["load"]["blocks_total"] > 0


def test_doctor_says_that_a_router_is_none(cluster: Cluster) -> None:
    done = run("doctor", "--target", cluster.target)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"kvrelay: {cluster.target} is a router, and holds no KV; ask its workers")


def test_a_refused_request_is_one_line_and_exit_code_2(cluster: Cluster) -> None:
    done = run("generate", "--target", cluster.target, "--token-ids", "1,9999", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvrelay: token_ids is token id 9999; allowed: 0 to 383, the model's vocabulary\n"


def test_roles_are_the_processes_that_one_would_start_by_hand(cluster: Cluster) -> None:
    commands = [command_line(pid) for pid in descendants(cluster.up_pid)]
    started = [words[words.index("serve") :][:2] for words in commands if "serve" in words]
    assert sorted(started) == [["serve", "decode"], ["serve", "prefill"], ["serve", "router"]]
    for words in commands:
        if "serve" in words:
            assert words[1:3] == list(KVRELAY[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "{folder}/nothing"), "{folder}/nothing"),
        (("--model", "{model}", "--block-tokens", "24"), "block_tokens must be a power of two, not 24"),
        (("--model", "{model}", "--prefill", "0", "--kv-blocks", "100000000"), "GiB"),
        (("--model", "{model}", "--prefill", "0", "--device", "cuda:99"), "cuda"),
    ],
)
def test_up_ends_with_the_message_of_a_role_that_cannot_start(
    checkpoint: CheckpointMaker, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    places = {"folder": str(tmp_path), "model": str(checkpoint("llama3_scaled"))}
    done = run("up", *(word.format(**places) for word in words), timeout_s=100)
    last = done.stderr.rstrip("\n").rpartition("\n")[2]
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert last.startswith("kvrelay: ")
    assert message.format(**places) in last
    assert "Traceback" not in done.stderr


@dataclass
class Guarded:
    """A cluster that wants a certificate and a key, and what to show it."""

    cluster: Cluster
    model_dir: Path
    tls: TlsFiles
    keys: Path

    def client(self, *, tls: TlsFiles | None, api_key: str | None = "secret-two") -> AsyncClient:
        return self.cluster.client(tls=tls, api_key=api_key)

    def generate(self, *words: str) -> subprocess.CompletedProcess[str]:
        flags = ("--tls-cert", str(self.tls.certificate), "--tls-key", str(self.tls.key), "--tls-ca", str(self.tls.ca))
        request = ("--token-ids", "1,2,3", "--max-tokens", "2", "--json")
        return run("generate", "--target", self.cluster.target, *request, *flags, *words)


@pytest.fixture(scope="module")
def guarded(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text("secret-one\nsecret-two\n")
    tls = CertificateAuthority(folder / "ca").issue("cluster")
    model_dir = checkpoint("llama3_scaled")
    with Cluster(model_dir, tls=tls, api_key_file=keys) as cluster:
        yield Guarded(cluster, model_dir, tls, keys)


async def test_only_holders_of_a_key_are_answered(guarded: Guarded) -> None:
    for key in (None, "secret"):
        async with guarded.client(tls=guarded.tls, api_key=key) as client:
            with pytest.raises(UnauthenticatedError):
                await ask_greedy(client, [1, 2, 3], 2)
    async with guarded.client(tls=guarded.tls) as client:
        assert len(await ask_greedy(client, [1, 2, 3], 2)) == 2
    assert guarded.generate().returncode == 2
    done = guarded.generate("--api-key-file", str(guarded.keys))
    assert (done.returncode, len(json.loads(done.stdout)["token_ids"])) == (0, 2), done.stderr
    guarded.cluster.assert_no_leaks()


async def test_with_tls_only_holders_of_a_certificate_are_answered(guarded: Guarded, tmp_path: Path) -> None:
    stranger = CertificateAuthority(tmp_path / "other").issue("stranger")
    for tls in (None, stranger):
        async with guarded.client(tls=tls) as client:
            with pytest.raises(UnavailableError):
                await ask_greedy(client, [1, 2, 3], 2)
    prompt = make_prompt(384, 100, 1)
    async with guarded.client(tls=guarded.tls) as client:
        answer = await ask(client, token_ids=prompt, max_tokens=4, temperature=0, ignore_eos=True)
    assert answer.token_ids == reference_greedy(guarded.model_dir, [prompt], 4)[0]
    assert answer.handoff.blocks_pulled > 0
    guarded.cluster.assert_no_leaks()


async def test_without_prefill_workers_decode_does_both(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    prompt = make_prompt(384, 700, 1)
    with Cluster(model_dir, prefill=0) as cluster:
        async with cluster.client() as client:
            answer = await ask(client, token_ids=prompt, max_tokens=16, temperature=0, ignore_eos=True)
        assert answer.token_ids == reference_greedy(model_dir, [prompt], 16)[0]
        assert answer.end.timing.handoff is None
        cluster.assert_no_leaks()


def test_listening_beyond_loopback_needs_a_decision(checkpoint: CheckpointMaker) -> None:
    done = run("up", "--model", str(checkpoint("llama3_scaled")), "--host", "0.0.0.0", timeout_s=100)
    assert done.returncode == 2
    assert "--allow-insecure" in done.stderr.rstrip("\n").rpartition("\n")[2]
