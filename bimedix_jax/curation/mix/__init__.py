"""Sources in both languages into one training set, at an exact ratio, without evaluation and near-duplicates."""
