"""The arena: the same teacher, the same budget, every method; `docs/arena.md` is what it found."""
