"""Examples to fine-tune on: read from JSON lines, encoded with their trained part marked, served as samples."""
