"""Densities as plain values: built from them, and loaded from checkpoints that hold them."""
