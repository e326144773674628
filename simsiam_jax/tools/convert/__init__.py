"""Converts weights between formats."""
