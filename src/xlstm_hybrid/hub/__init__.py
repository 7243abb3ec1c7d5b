"""Sharing a checkpoint."""
