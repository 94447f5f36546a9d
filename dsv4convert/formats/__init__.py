"""Number formats: bits to numbers and back, on tiles of rows; see docs/formats.md."""
