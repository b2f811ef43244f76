"""The synchronous inference engine and the process that runs it."""
