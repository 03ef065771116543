"""The default data set: emoji and icons drawn in several styles, with their names."""
