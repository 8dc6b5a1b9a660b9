"""WHAT exists: features, the sites they live at, and catalogs of them. No torch, no vLLM."""
