"""Generated from proto/steerscope/v1 by scripts/generate_protos.sh; do not edit."""
