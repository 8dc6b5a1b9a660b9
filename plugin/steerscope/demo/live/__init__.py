"""The model behind a real server: start it, ask it, show it, evaluate it."""
