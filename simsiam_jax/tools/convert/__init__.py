"""Weights between formats."""
