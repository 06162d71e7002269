"""What `doctor` and `bench transfer` measure on GPUs, whose bytes and words are verified with each read."""

from __future__ import annotations

import json

import pytest
import torch

from kvrelay_cli.main import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def test_connectors_of_gpu_pools_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--connector", "cuda_ipc,grpc", "--device", "cuda", "--size-mib", "16", "--span-kib", "16,2048"]
    assert main(["bench", "transfer", *words, "--repeats", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["connector"], row["span_bytes"] >> 10) for row in rows] == [
        ("cuda_ipc", 16), ("cuda_ipc", 2048), ("grpc", 16), ("grpc", 2048),
    ]  # fmt: skip
    assert all(row["gb_per_s"] > 0 and row["plain_gb_per_s"] > 0 for row in rows)


def test_doctor_names_every_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-speed", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["torch"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["auto"]["cuda"][0] == "cuda_ipc"
    for index, gpu in enumerate(facts["gpus"]):
        assert gpu["name"] == torch.cuda.get_device_name(index) and index not in gpu["peers"]
