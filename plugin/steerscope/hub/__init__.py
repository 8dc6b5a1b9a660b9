"""The hub: one process per vLLM launch. Fan-in, policies, gRPC, exporters."""
