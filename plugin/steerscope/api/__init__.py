"""The gRPC API, as generated; one package for each version."""
