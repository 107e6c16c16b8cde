"""The teacher and student phases: the step, a run's parts, and the loop around them."""
