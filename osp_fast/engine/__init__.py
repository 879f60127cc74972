"""What makes a step fast: what is kept for backward, what is compiled and captured, and what a step should cost."""
