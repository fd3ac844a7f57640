"""Whole records from English into Arabic: translated, judged, refined, and handed to people where needed."""
