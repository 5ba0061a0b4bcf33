"""The Lightning strategy, and what it knows about DeepSpeed's ZeRO state."""
