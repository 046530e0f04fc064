"""Kills at random moments, and what is left after them: python -m tests.chaos."""
