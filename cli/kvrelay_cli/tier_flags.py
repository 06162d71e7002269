"""Flags that say which tiers there are, for workers and for `kvrelay cache`.

No flag takes a password or a secret: whoever may list processes would read it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvrelay_cli import flag_types

CODECS = ("none", "zstd", "fp8")
POLICIES = ("lru", "s3-fifo")

if TYPE_CHECKING:
    from kvrelay_transfer.tiers.tier_config import TierConfig


def add_tier_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tiers", "where KV lives on when a worker has no room for it; default: nowhere")
    group.add_argument(
        "--host-cache", type=flag_types.size, metavar="SIZE", help="host memory of each worker, such as 4GiB"
    )
    add_shared_tier_flags(group)
    group.add_argument(
        "--cache-codec",
        choices=CODECS,
        help="makes parts on disk and in Redis smaller: none (default), zstd (lossless), fp8 (answers may change)",
    )
    group.add_argument(
        "--cache-policy",
        choices=POLICIES,
        help="who goes first where host memory is full: lru (default), or s3-fifo, which long scans do not flush",
    )


def add_shared_tier_flags(group: argparse._ActionsContainer) -> None:
    """Those that outlive a worker."""
    group.add_argument(
        "--disk-cache",
        type=flag_types.sized_folder,
        metavar="DIR:SIZE",
        help="folder that all workers of this host share, such as /var/cache/kvrelay:20GiB",
    )
    group.add_argument(
        "--redis-url",
        metavar="URL",
        help="redis://[USER@]HOST:PORT, rediss://, redis-sentinel://HOST:PORT,.../SERVICE or redis-cluster://HOST:PORT",
    )
    group.add_argument(
        "--redis-password-file",
        metavar="FILE",
        help="file with its password (default: the environment's KVRELAY_REDIS_PASSWORD, or none)",
    )
    group.add_argument(
        "--cache-secret-file",
        metavar="FILE",
        help="32 bytes or 64 hexadecimal digits: who does not have them can neither find nor forge what is stored",
    )


def tier_config(args: argparse.Namespace) -> TierConfig:
    """Raises ConfigError."""
    from kvrelay_transfer.tiers.tier_config import TierConfig

    folder = flag_types.SizedFolder("", 0)
    if args.disk_cache:
        folder = flag_types.split_sized_folder(args.disk_cache)
    config = TierConfig(
        host_bytes=getattr(args, "host_cache", None),
        disk_dir=folder.path,
        disk_bytes=folder.size_bytes,
        redis_url=args.redis_url or "",
        redis_password_file=args.redis_password_file or "",
        codec=getattr(args, "cache_codec", None) or "none",
        policy=getattr(args, "cache_policy", None) or "lru",
        secret_file=args.cache_secret_file or "",
    )
    config.validate()
    return config
