"""INSIDE vLLM: seams, taps, the in-graph op, steering rows, batch plan, readout."""
