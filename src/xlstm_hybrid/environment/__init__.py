"""What a machine has and does well: versions of packages, and precision."""
