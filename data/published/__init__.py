"""Files as their publishers made them: listed by a kind of source, then fetched, in part or whole, or streamed."""
