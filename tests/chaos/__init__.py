"""The buffer in a simulated world: one clock, one source of randomness, every kind of fault."""
