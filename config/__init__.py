"""Configuration: the YAML files, the typed schema they are read into, and what every command line shares."""
