"""Control plane: who is alive, which generation runs, and what everyone does after a failure. No torch in here."""
