"""The Lightning callback: when to checkpoint, from where to restore."""
