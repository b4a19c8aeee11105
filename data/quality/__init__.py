"""Published quality rules for text from the web, as numba kernels over batches of documents; see docs/quality.md."""
