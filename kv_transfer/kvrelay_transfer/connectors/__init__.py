"""The ways to read a peer's blocks: `base` is their contract, `registry` knows them all. Imports none of them."""
