"""The report of an analysis of routes: claims.json, CSV files and one page."""
