"""The compiler half: a stub that is never reached under the interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class CPUBackend(BaseBackend):
    """Accepts the target ``cpu`` and compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "steerscope-triton-cpu"

    def parse_options(self, options: dict[str, Any]) -> Any:
        raise NotImplementedError("no compiler here: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        raise NotImplementedError("no compiler here: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
