"""What every operation needs to choose and start a backend.

Nothing here knows an operation; each hands in its own kernel and the check of it.
"""
