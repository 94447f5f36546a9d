"""A page to look at: one HTML file of the JSON that a command prints, with nothing loaded from elsewhere."""

# The command of the page that every conversion has.
CONVERSION = "conversion"
