"""WHAT was seen: frames, aggregation, signals. No torch, no vLLM."""
