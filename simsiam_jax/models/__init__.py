"""Backbones, heads and the network made of them."""
