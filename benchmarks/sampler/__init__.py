"""Speed, memory and counts of SD3.5's sampler."""
