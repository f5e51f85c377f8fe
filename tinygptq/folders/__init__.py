"""Folders to clean arrays and back: every generation of GPTQ file, plain checkpoints, and what they weigh."""
