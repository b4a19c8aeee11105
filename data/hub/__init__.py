"""Data sets of the Hugging Face hub: what a repository holds, which files are meant, and reading them remotely."""
