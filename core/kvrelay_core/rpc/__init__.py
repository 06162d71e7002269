"""What all gRPC servers and clients of KVRelay share: status mapping, channels, server life, common messages."""
