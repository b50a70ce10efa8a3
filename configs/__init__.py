"""Configs: one file per method, read by `lorajax.config`. They import nothing else."""
