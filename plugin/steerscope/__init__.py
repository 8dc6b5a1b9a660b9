"""Steerscope: live feature telemetry and steering for stock vLLM.

Importing this package is cheap on purpose: vLLM imports it in every process
(entry point ``vllm.general_plugins``), configured or not. Nothing heavier than
the standard library may be imported here.
"""

__version__ = "0.1.0"
