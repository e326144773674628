"""Backbones, heads and the network that combines them."""
