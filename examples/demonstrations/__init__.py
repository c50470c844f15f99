"""Data, networks, training, measures and figures of the demonstrations and the comparison."""
