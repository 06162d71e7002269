"""`kvrelay generate`: flags become the client's arguments, events become text or JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvrelay_cli.commands import generate
from kvrelay_cli.main import main
from kvrelay_client import Delta, Finish, GenerateOptions, SamplingOptions, Timing
from kvrelay_core.errors import ConfigError
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.request import FinishReason, HandoffTiming, TokenLogprobs, Usage

TIMING = Timing(0.1, 0.2, 0.3, 0.01, 0.02, 1, "prefill-0", "decode-0", HandoffTiming(10, 0.5, 1, 2, "shm"))
EVENTS: list[Delta | Finish] = [
    Delta(0, (5,), "a", (TokenLogprobs(-0.5, ((5, -0.5),)),)),
    Delta(1, (6,), "b"),
    Delta(0, (7, 8), "c"),
    Finish(0, FinishReason.STOP, Usage(3, 0, 3), TIMING, "c"),
    Finish(1, FinishReason.LENGTH, Usage(3, 0, 1), TIMING),
]


def request_of(*words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return generate.request_of(parser.parse_args(["--target", "h:1", *words]))


def test_only_what_was_given_is_sent() -> None:
    assert request_of("--token-ids", "1,2") == {"token_ids": (1, 2), "model": ""}
    sent = request_of("--prompt", "x", "--stop", "a", "--stop", "b", "--logit-bias", "4=-1.5", "--ignore-eos")
    assert sent == {
        "prompt": "x", "model": "", "stop": ["a", "b"], "logit_bias": {4: -1.5}, "ignore_eos": True,
    }  # fmt: skip


def test_images_go_before_the_text_of_a_message_or_beside_token_ids(tmp_path: Path) -> None:
    cat, dog = tmp_path / "cat.png", tmp_path / "dog.png"
    cat.write_bytes(b"cat")
    dog.write_bytes(b"dog")
    sent = request_of("--prompt", "which?", "--image", str(cat), "--image", str(dog))
    images = [{"type": "image", "image": b"cat"}, {"type": "image", "image": b"dog"}]
    message = {"role": "user", "content": [*images, {"type": "text", "text": "which?"}]}
    assert sent == {"messages": [message], "model": ""}
    sent = request_of("--token-ids", "1,2", "--image", str(cat))
    assert sent == {"token_ids": (1, 2), "media": [b"cat"], "model": ""}
    with pytest.raises(ConfigError, match="cannot read --image"):
        request_of("--prompt", "x", "--image", str(tmp_path / "none.png"))


def test_a_videos_frames_go_behind_the_images_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    for number in (10, 2, 1):
        (tmp_path / f"shot-{number}.jpg").write_bytes(b"%d" % number)
    given = ("--image", str(tmp_path / "cat.png"), "--video-frames", str(tmp_path / "shot-*.jpg"), "--fps", "2.5")
    video = VideoFrames((b"1", b"2", b"10"), 2.5)
    parts = [{"type": "image", "image": b"cat"}, {"type": "video", "video": video}, {"type": "text", "text": "what?"}]
    assert request_of("--prompt", "what?", *given)["messages"] == [{"role": "user", "content": parts}]
    assert request_of("--token-ids", "1,2", *given)["media"] == [b"cat", video]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--video-frames", "*.jpg"], "needs --fps"),
        (["--video-frames", "/nowhere/*.jpg", "--fps", "1"], "no file matches"),
        (["--fps", "1"], "there are none"),
    ],
)
def test_a_video_needs_frames_and_a_rate(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_of("--prompt", "x", *flags)


def test_every_sampling_option_of_the_client_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    flags = {action.dest for action in parser._actions}
    assert set(SamplingOptions.__annotations__) <= flags
    sent = request_of("--prompt", "x", "--temperature", "0", "--seed", "1", "--n", "2", "--timeout", "5")
    assert set(sent) <= {*GenerateOptions.__annotations__, *SamplingOptions.__annotations__, "prompt", "timeout_s"}


def test_one_choice_is_one_object() -> None:
    answer = json.loads(json.dumps(generate.collect([EVENTS[0], EVENTS[2], EVENTS[3]], num_choices=1)))
    assert (answer["token_ids"], answer["text"], answer["finish_reason"]) == ([5, 7, 8], "ac", "stop")
    assert answer["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 3}
    assert answer["timing"]["ttft_s"] == 0.2
    assert answer["timing"]["handoff"]["connector"] == "shm"
    assert answer["logprobs"] == [{"logprob": -0.5, "top": [[5, -0.5]]}]


def test_several_choices_are_a_list() -> None:
    answer = generate.collect(EVENTS, num_choices=2)
    assert [choice["text"] for choice in answer["choices"]] == ["ac", "b"]


def test_text_streams_the_first_choice_and_then_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    generate.show(EVENTS)
    assert capsys.readouterr().out == "ac\n--- choice 1\nb\n"


def test_the_api_key_is_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst\nsecond\n")
    assert generate.read_api_key(str(file)) == "first"
    assert generate.read_api_key(None) is None
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        generate.read_api_key(str(file))


def test_nobody_listening_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", "127.0.0.1:1", "--prompt", "x", "--timeout", "5"]) == 1
    assert capsys.readouterr().err.startswith("kvrelay: 127.0.0.1:1")


def test_an_empty_prompt_of_ids_is_refused_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", "127.0.0.1:1", "--token-ids", ""]) == 2
    assert "--token-ids is empty" in capsys.readouterr().err
