"""The teacher and student phases: the step, the parts of a run, and the training loop."""
