"""Blocks solved from a convolution's weights in closed form: one file per block, found by being here."""
