"""One file per kernel facility. Nothing here knows what a container is."""
