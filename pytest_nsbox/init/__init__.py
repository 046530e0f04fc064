"""PID 1 of a container, and what enters it."""
