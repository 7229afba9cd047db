"""The rewrite passes, one a file."""
