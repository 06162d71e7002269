"""The vocabulary that every KVRelay process shares. Knows nothing of torch and, outside `rpc/`, of gRPC."""
