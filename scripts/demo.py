"""The demo that `scripts/demo` runs once everything is installed. See there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvrelay_client import Client, Delta, Finish

ROOT = Path(__file__).resolve().parent.parent
SHARED = "A relay race has one rule: the baton may not fall. " * 12
PROMPTS = (SHARED + "First question.", SHARED + "Another question, after the same beginning.")
MAX_TOKENS = 48


def main() -> int:
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvrelay-demo-") as folder:
        model = make_model(Path(folder) / "model")
        print(f"model      a random Llama of 4 layers in {model}")
        command = [sys.executable, "-m", "kvrelay_cli", "up", "--model", str(model), "--served-model-name", "demo"]
        command += ["--kv-blocks", "128", "--log-level", "warning", "--threads-per-worker", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
            try:
                target = wait_ready(up)
                show_processes(up.pid)
                for number, prompt in enumerate(PROMPTS, start=1):
                    ask(target, number, prompt)
            finally:
                up.send_signal(signal.SIGTERM)
        print(f"\nstopped    exit code {up.returncode}, {time.monotonic() - started_s:.1f} s in all")
    return up.returncode


def make_model(folder: Path) -> Path:
    """Random weights in the format of Hugging Face, with a byte-level tokenizer."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from checkpoints import make_checkpoint

    return make_checkpoint(folder, "llama", num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=4, vocab_size=2048)


def wait_ready(up: subprocess.Popen[str]) -> str:
    assert up.stdout is not None
    line = up.stdout.readline()  # ends with the process at the latest
    if not line.startswith("ready grpc="):
        raise SystemExit("the cluster did not start; see above")
    return line.removeprefix("ready grpc=").split()[0]


def show_processes(up_pid: int) -> None:
    print("processes")
    children = Path(f"/proc/{up_pid}/task/{up_pid}/children").read_text().split()
    for pid in children:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        role = words[words.index("serve") + 1]
        port = words[words.index("--grpc-port") + 1]
        print(f"           {role:<8} pid {pid:<7} grpc 127.0.0.1:{port}")


def ask(target: str, number: int, prompt: str) -> None:
    print(f"\nprompt {number}   {prompt[:28]}... {prompt[-24:]}\nanswer     ", end="")
    with Client(target) as client:
        for event in client.generate(prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True):
            if isinstance(event, Delta):
                print(event.text.replace("\n", " "), end="", flush=True)
            elif isinstance(event, Finish):
                print(f"\n{report(event)}")


def report(finish: Finish) -> str:
    usage, timing = finish.usage, finish.timing
    mean_ms, max_ms = timing.inter_token_mean_s * 1e3, timing.inter_token_max_s * 1e3
    rows = {
        "prompt": f"{usage.prompt_tokens} tokens, {usage.cached_tokens} of them from the prefix cache",
        "answer": f"{usage.completion_tokens} tokens in {timing.total_s * 1e3:.1f} ms",
        "first token": f"{timing.ttft_s * 1e3:.1f} ms",
        "inter-token": f"{mean_ms:.2f} ms mean, {max_ms:.2f} ms longest",
        "workers": f"{timing.prefill_worker} -> {timing.decode_worker}",
    }
    if handoff := timing.handoff:
        rows["hand-off"] = f"{handoff.size_bytes / 1e6:.2f} MB in {handoff.seconds * 1e3:.2f} ms by {handoff.connector}"
        rows["KV blocks"] = f"{handoff.blocks_pulled} pulled, {handoff.blocks_reused} reused"
    return "\n".join(f"  {name:<12} {value}" for name, value in rows.items())


if __name__ == "__main__":
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    sys.exit(main())
