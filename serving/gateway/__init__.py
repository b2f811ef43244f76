"""The HTTP API: validation, moderation, streaming, limits and health."""
