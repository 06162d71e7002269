"""`kvrelay generate`: one prompt to a running cluster; the answer as it comes, or as one JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvrelay_cli import flag_types
from kvrelay_cli.flags import add_tls_flags
from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.media.video import VideoFrames

if TYPE_CHECKING:
    from kvrelay_client import Delta, Finish
    from kvrelay_core.rpc.channel import TlsFiles

EPILOG = """\
With --json, one object: {"token_ids", "text", "finish_reason", "usage", "timing"}; with --n above 1 it holds
{"choices": [...]} of such objects instead. Durations are in seconds.

examples:
  kvrelay generate --target 127.0.0.1:50051 --prompt "Once upon a time" --max-tokens 64
  kvrelay generate --target 127.0.0.1:50051 --image cat.png --prompt "What is this?" --max-tokens 64
  kvrelay generate --target 127.0.0.1:50051 --video-frames 'clip/*.jpg' --fps 2 --prompt "What happens?"
  kvrelay generate --target 127.0.0.1:50051 --token-ids 1,2,3 --max-tokens 8 --temperature 0 --json
  kvrelay generate --target 127.0.0.1:50051 --prompt "Roses are" --temperature 0.8 --top-p 0.9 --seed 7 --n 2
"""

# Flag, type, metavar, help; every one is a field of the request's sampling parameters.
_SAMPLING: tuple[tuple[str, Any, str, str], ...] = (
    ("--max-tokens", flag_types.integer(0), "N", "longest answer in tokens"),
    ("--min-tokens", flag_types.integer(0), "N", "no stop condition counts before"),
    ("--temperature", float, "X", "0 takes the most likely token; default: the model's"),
    ("--top-p", float, "X", "of the most likely tokens, as many as add up to this probability"),
    ("--top-k", flag_types.integer(0), "N", "of the N most likely tokens; 0: of all"),
    ("--min-p", float, "X", "of tokens at least this likely, relative to the most likely one"),
    ("--repetition-penalty", float, "X", "above 1 makes tokens that occurred less likely"),
    ("--frequency-penalty", float, "X", "subtracted from a logit per occurrence in the answer"),
    ("--presence-penalty", float, "X", "subtracted from a logit that occurred in the answer"),
    ("--seed", flag_types.integer(0), "N", "the same seed gives the same answer"),
    ("--n", flag_types.integer(1), "N", "answers to the one prompt"),
    ("--logprobs", flag_types.integer(0), "N", "with --json: log probabilities, and those of the N most likely tokens"),
    ("--stop-token-ids", flag_types.integers, "I,J", "tokens that end the answer"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", type=flag_types.address, required=True, metavar="HOST:PORT", help="where the router listens"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt as text")
    prompt.add_argument("--token-ids", type=flag_types.integers, metavar="I,J,...", help="the prompt as token ids")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="an image, before the text of --prompt, which then is a chat message; with --token-ids, one for each "
        "placeholder; may be repeated",
    )
    parser.add_argument(
        "--video-frames",
        metavar="GLOB",
        help="a video: the images that match, in the order of the numbers in their names; behind the images. It has to "
        "be sampled before, such as by ffmpeg -i clip.mp4 -vf fps=2 clip/%%04d.jpg",
    )
    parser.add_argument(
        "--fps", type=flag_types.number(0.001), metavar="HZ", help="how many of the frames make a second"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="served model; default: the only one")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of the stream")
    parser.add_argument("--api-key-file", metavar="FILE", help="its first line is sent as bearer token")
    parser.add_argument("--timeout", type=flag_types.number(0.001), metavar="SECONDS", help="give up after")
    add_tls_flags(parser, "for a cluster that was started with them")
    sampling = parser.add_argument_group("sampling")
    for flag, kind, metavar, text in _SAMPLING:
        sampling.add_argument(flag, type=kind, metavar=metavar, help=text)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")
    sampling.add_argument(
        "--logit-bias",
        type=flag_types.logit_bias,
        action="append",
        metavar="ID=BIAS",
        help="added to a token's logit; may be repeated",
    )
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="end-of-text tokens end nothing")


def run(args: argparse.Namespace) -> int:
    if args.token_ids is not None and not args.token_ids:
        raise InvalidRequestError("--token-ids is empty; give at least one token id")
    from kvrelay_client import Client

    with Client(args.target, api_key=read_api_key(args.api_key_file), tls=tls_files(args)) as client:
        events = client.generate(**request_of(args))
        if args.json:
            print(json.dumps(collect(events, num_choices=args.n or 1)))
        else:
            show(events)
    return 0


def request_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Client.generate`; what was not given is left to the model's defaults."""
    names = [flag.lstrip("-").replace("-", "_") for flag, *_ in _SAMPLING]
    given = {name: getattr(args, name) for name in (*names, "stop", "ignore_eos", "prompt", "token_ids")}
    given["timeout_s"] = args.timeout
    given["model"] = args.model
    given["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    media: list[bytes | VideoFrames] = [read_image(path, "--image") for path in args.image or ()]
    if args.video_frames is None and args.fps is not None:
        raise ConfigError("--fps is the rate of --video-frames, of which there are none")
    if args.video_frames is not None:
        media.append(read_video(args.video_frames, args.fps))
    if media:
        text = given.pop("prompt")
        given["media" if text is None else "messages"] = media if text is None else [_message(media, text)]
    return {name: value for name, value in given.items() if value is not None}


def read_image(path: Path, flag: str) -> bytes:
    """As it is in the file: router and encoder look into it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {flag} {path}: {error.strerror}") from error


def read_video(pattern: str, fps: float | None) -> VideoFrames:
    if fps is None:
        raise ConfigError("--video-frames needs --fps: how many of the frames make a second")
    paths = sorted(map(Path, glob.glob(pattern)), key=_by_numbers)
    if not paths:
        raise ConfigError(f"no file matches --video-frames {pattern}; quote the pattern, so that the shell leaves it")
    return VideoFrames(tuple(read_image(path, "--video-frames") for path in paths), fps)


def _by_numbers(path: Path) -> list[tuple[str, int]]:
    """Frame 10 comes behind frame 9, with zeros in front or without."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", path.name)]


def _message(media: list[bytes | VideoFrames], text: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": item} if isinstance(item, bytes) else {"type": "video", "video": item}
        for item in media
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def read_api_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read --api-key-file {path}: {error.strerror}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; its first line that is not a comment is taken")
    return keys[0]


def tls_files(args: argparse.Namespace) -> TlsFiles | None:
    given = (args.tls_cert, args.tls_key, args.tls_ca)
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("TLS needs all of --tls-cert, --tls-key and --tls-ca")
    for path in given:
        if not os.access(path, os.R_OK):
            raise ConfigError(f"cannot read {path}; --tls-cert, --tls-key and --tls-ca name PEM files")
    from kvrelay_core.rpc.channel import TlsFiles

    return TlsFiles(Path(args.tls_cert), Path(args.tls_key), Path(args.tls_ca))


def show(events: Iterable[Delta | Finish]) -> None:
    """Text of the first choice as it comes; other choices when the first is through."""
    from kvrelay_client import Delta

    later: dict[int, list[str]] = {}
    for event in events:
        if not isinstance(event, Delta):
            continue
        if event.index == 0:
            print(event.text, end="", flush=True)
        else:
            later.setdefault(event.index, []).append(event.text)
    print()
    for index, pieces in sorted(later.items()):
        print(f"--- choice {index}\n{''.join(pieces)}")
    sys.stdout.flush()


def collect(events: Iterable[Delta | Finish], num_choices: int) -> dict[str, Any]:
    from kvrelay_client import Delta

    choices: list[dict[str, Any]] = [{"token_ids": [], "text": ""} for _ in range(num_choices)]
    for event in events:
        choice = choices[event.index]
        if isinstance(event, Delta):
            choice["token_ids"] += event.token_ids
            choice["text"] += event.text
            if event.logprobs:
                choice.setdefault("logprobs", []).extend(_named(entry) for entry in event.logprobs)
        else:
            choice["finish_reason"] = str(event.reason)
            choice["stop_reason"] = event.stop_reason
            choice["usage"] = _named(event.usage)
            choice["timing"] = _named(event.timing)
    return choices[0] if num_choices == 1 else {"choices": choices}


def _named(value: Any) -> Any:
    """Plain data with the names of the fields; msgspec's own form of array-like structs is a list."""
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value):
        return {field.name: _named(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value
