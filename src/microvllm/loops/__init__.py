"""How steps follow each other: engine.Loop makes one after the other, and these in other ways."""
