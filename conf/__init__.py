"""Hydra configuration groups; installed as ``lightning_gemini.conf``."""
