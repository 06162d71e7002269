"""Where a checkpoint lies and what its `generation_config.json` says about generating.

Shared by the router, which reads the tokenizer and the defaults, and the engine, which reads the weights. Knows
the files' names; nothing of tensors, architectures or tokenizers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from msgspec import Struct

from kvrelay_core.errors import ConfigError

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = ("*.safetensors",)
# Copies of the weights in other formats, which some repositories keep in sub-folders.
_NOT_NEEDED = ("original/*", "onnx/*", "metal/*", "*/consolidated*", "consolidated*")


class GenerationDefaults(Struct, frozen=True, kw_only=True):
    """What a request gets for a sampling parameter that it leaves out; None: the checkpoint does not say."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: `model` itself, or the downloaded copy of a Hugging Face hub id.

    Without `weights` only the small files are fetched. Raises ConfigError that says what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _with_config(folder)
    if folder.exists():
        raise ConfigError(f"model {model} is a file; give the folder that holds config.json")
    if not _looks_like_hub_id(model):
        raise ConfigError(f"model {model!r} is neither a folder nor a hub id such as organisation/name; check the path")
    return _with_config(_download(model, (*_SMALL_FILES, *_WEIGHTS) if weights else _SMALL_FILES))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file; {} when there is no such file. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; download the checkpoint again")
    return value


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """From `generation_config.json`, with the end-of-text ids of `config.json` where it has none.

    `do_sample: false` makes greedy decoding the default. Raises ConfigError for values of the wrong type.
    """
    path = folder / "generation_config.json"
    config = read_json(path)
    model_config = read_json(folder / "config.json")
    eos = config.get("eos_token_id")
    if eos is None:
        eos = model_config.get("eos_token_id", model_config.get("text_config", {}).get("eos_token_id"))
    temperature = _number(config, "temperature", path)
    if config.get("do_sample") is False:
        temperature = 0.0
    top_k = _number(config, "top_k", path)
    return GenerationDefaults(
        eos_token_ids=_token_ids(eos, path),
        temperature=temperature,
        top_p=_number(config, "top_p", path),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(config, "min_p", path),
        repetition_penalty=_number(config, "repetition_penalty", path),
    )


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    return folder


def _download(model: str, patterns: tuple[str, ...]) -> Path:
    # Imported here: it takes long, and a local folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=list(_NOT_NEEDED)))
    except GatedRepoError as error:
        raise ConfigError(f"model {model} needs its licence accepted on the hub and HF_TOKEN set") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no model {model}, or HF_TOKEN may not read it; check the name, or give a local folder"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"cannot download model {model}: {error}; check the network, or give a local folder as the model"
        ) from error


def _number(config: dict[str, Any], name: str, path: Path) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{path}: {name} must be a number, not {value!r}")
    return float(value)


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ConfigError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))
