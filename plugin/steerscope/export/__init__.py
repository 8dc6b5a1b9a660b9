"""How it is told: the names of all instruments, and the exporters. No torch, no vLLM."""
