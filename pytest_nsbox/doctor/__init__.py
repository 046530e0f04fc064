"""What this host can give to containers, found by trying."""
