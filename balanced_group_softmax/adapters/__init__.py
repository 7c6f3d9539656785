"""Thin adapters to detection frameworks; import the one you need by its path."""
