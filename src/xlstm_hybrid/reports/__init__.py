"""Everything that is only shown."""
