"""Densities as plain values: built from them, and brought back from checkpoints that hold them."""
