"""Everything around a training step in which no paper occurs."""
