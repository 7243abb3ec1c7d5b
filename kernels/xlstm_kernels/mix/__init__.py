"""The gated sum of a hybrid layer's two branches."""
