"""The data half: sources, documents, tokenizers, and the token files that training reads."""
