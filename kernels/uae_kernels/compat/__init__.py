"""The calls of other codebases over our ops: `trl`, `liger`, `verl` and `flow_grpo`. No module imports its namesake."""
