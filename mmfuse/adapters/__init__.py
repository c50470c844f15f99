"""Thin adapters to training frameworks, one file each; import the one that you use."""
