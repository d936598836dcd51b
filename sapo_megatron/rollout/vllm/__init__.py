"""Rollouts on vLLM servers: sampling, new weights, verification."""
