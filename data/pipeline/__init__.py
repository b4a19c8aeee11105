"""From documents to token files: functions on batches, and the three stages that call them."""
