from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvrelay_core.checkpoint import GenerationDefaults, read_generation_defaults, resolve_model
from kvrelay_core.errors import ConfigError


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, config={})
    assert resolve_model(str(tmp_path)) == tmp_path


def test_what_cannot_be_a_model_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for model, advice in (
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "file"), "give the folder"),
        (str(tmp_path / "absent"), "check the path"),
        ("no-such-model", "check the path"),
    ):
        with pytest.raises(ConfigError, match=advice):
            resolve_model(model)


def test_a_hub_that_cannot_be_reached_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def fail(model: str, **options: Any) -> str:
        asked.append((model, options["allow_patterns"]))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="check the network"):
        resolve_model("organisation/name")
    with pytest.raises(ConfigError):
        resolve_model("organisation/name", weights=False)
    assert "*.safetensors" in asked[0][1]
    assert "*.safetensors" not in asked[1][1]


def test_generation_defaults(tmp_path: Path) -> None:
    write(
        tmp_path,
        config={"eos_token_id": 2},
        generation_config={
            "eos_token_id": [7, 8, 7],
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 20,
            "do_sample": True,
            "repetition_penalty": 1.05,
        },
    )
    expected = GenerationDefaults(eos_token_ids=(7, 8), temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    assert read_generation_defaults(tmp_path) == expected


def test_without_sampling_the_default_is_greedy_and_the_end_is_the_models(tmp_path: Path) -> None:
    write(tmp_path, config={"eos_token_id": 2}, generation_config={"do_sample": False, "temperature": 0.6})
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.eos_token_ids) == (0.0, (2,))


def test_without_a_file_nothing_is_said(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize("content", ["{", "[]", {"top_p": "much"}, {"eos_token_id": [-1]}, {"temperature": True}])
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: Any) -> None:
    write(tmp_path, generation_config=content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_generation_defaults(tmp_path)


def test_router_and_client_import_no_torch() -> None:
    code = (
        "import sys, kvrelay_router.main, kvrelay_client; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]
