"""The teacher and student phases: what a step computes, and the run around it."""
