"""Handles in the test process: what they stand for is the launcher's and init's."""
