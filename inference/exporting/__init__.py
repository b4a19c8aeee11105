"""Checkpoints as files of other programs."""
