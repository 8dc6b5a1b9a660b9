"""WHAT is asked: interventions, policies, admission. No torch, no vLLM."""
