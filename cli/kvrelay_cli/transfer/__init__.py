"""How fast each connector moves KV blocks between two processes on this machine; for `doctor` and `bench transfer`."""
