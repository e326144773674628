"""Processes, launchers, locks, storage, profiles and versions."""
