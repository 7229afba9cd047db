"""Real training loops over a prepared model, in one process and in two."""
