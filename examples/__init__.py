"""Programs that use the engine, each a lesson to read from top to bottom: see README.md."""
