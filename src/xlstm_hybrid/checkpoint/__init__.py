"""Checkpoint directories: whole or not at all, listed with hashes, with a record of where they came from."""
