"""What people call from Python: thin clients of the hub's gRPC services."""

from steerscope.client.async_client import AsyncClient
from steerscope.client.channel import Credentials
from steerscope.client.client import Client
from steerscope.client.refusals import CallError

__all__ = ["AsyncClient", "CallError", "Client", "Credentials"]
