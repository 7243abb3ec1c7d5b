"""Options of the layer that won nothing in the arena, kept for comparison."""
