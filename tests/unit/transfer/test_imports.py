"""What services import from here must not bring torch along."""

from __future__ import annotations

import subprocess
import sys

TORCH_FREE = [
    "layout",
    "ticket",
    "lease",
    "fence",
    "region",
    "host_memory",
    "memfd",
    "staging_slots",
    "descriptor_server",
    "quarantine",
    "copy_tuning",
    "connectors.base",
    "connectors.copy_thread",
    "connectors.grpc",
    "tiers.redis_store",
]


def test_modules_for_services_import_no_torch() -> None:
    imports = "; ".join(f"import kvrelay_transfer.{name}" for name in TORCH_FREE)
    code = f"{imports}; import kvrelay_engine.messages, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
