"""A whole run: what it will need, what it refuses, its texts, the walk, the result."""
