"""Vision towers: how to read visual tokens and signals from each kind."""
