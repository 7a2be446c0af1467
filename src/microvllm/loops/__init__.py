"""Loops: engine.Loop runs one step after the other; the loops here overlap or combine steps."""
