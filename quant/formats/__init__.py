"""Readers and writers of quantised checkpoint formats."""
