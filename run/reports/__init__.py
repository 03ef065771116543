"""HTML reports, plots and pictures."""
