"""Training: the jitted step, checkpoints, the run folder and the progress bar. The experiment owns the loop."""
