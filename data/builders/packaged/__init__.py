"""Small real evaluation sets out of Python and Debian packages."""
