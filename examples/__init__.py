"""Programs that use the engine. Each can be read from top to bottom: see README.md."""
