"""Where the demo's committed artifacts lie."""

from pathlib import Path
from typing import Final

ARTIFACTS_DIR: Final = Path(__file__).resolve().parent / "artifacts"
MODEL_DIR: Final = ARTIFACTS_DIR / "model"
CATALOG_DIR: Final = ARTIFACTS_DIR / "catalog"
CONFIG_FILE: Final = ARTIFACTS_DIR / "steerscope.yaml"
