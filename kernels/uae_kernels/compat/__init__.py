"""The calls of other codebases over our ops: `trl`, `liger` and `verl`. No module imports its namesake."""
