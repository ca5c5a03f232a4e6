"""Speed and memory, measured beside the alternatives; see README.md."""
