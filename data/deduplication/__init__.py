"""Removing what occurs more than once, or stands in an evaluation set."""
