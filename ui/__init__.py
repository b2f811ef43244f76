"""The chat page. Speaks HTTP to the public API and imports none of our other packages."""
