"""Experts into one student."""
