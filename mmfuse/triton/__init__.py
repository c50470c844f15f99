"""Triton."""

INTERPRETED = False
