"""Weights to and from Hugging Face's `transformers`, which is imported only when a function here is called.

An option that the other side lacks is refused by name; nothing is approximated.
"""
