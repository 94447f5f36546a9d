"""A page to look at: one HTML file of the JSON that a command prints, with nothing loaded from elsewhere."""
