"""What people call from Python: a thin, synchronous client of the hub's gRPC services."""

from steerscope.client.client import Client

__all__ = ["Client"]
