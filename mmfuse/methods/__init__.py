"""Decide: one paper in each file, its equations executed there."""
