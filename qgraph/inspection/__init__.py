"""What was rewritten, layer by layer."""
