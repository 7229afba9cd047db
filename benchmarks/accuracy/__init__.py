"""Training at low bits, method against method, at sizes that two cores train: `python -m benchmarks.accuracy -h`."""
