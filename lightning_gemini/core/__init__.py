"""The decisions of the package, pure: values in, values out. No torch, I/O, clock, thread or environment."""
