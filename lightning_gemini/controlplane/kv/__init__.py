"""Key-value stores that hold the job's membership, orders and reports; never on the iteration path."""
