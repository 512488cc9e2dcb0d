"""Hydra launcher for the GPUs of one machine: `hydra/launcher=gpus`."""
