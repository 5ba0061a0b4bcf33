"""Moves and stores shards: slabs in shared memory, their copies, and the wire between agents."""
