"""Studies of several arms and seeds: a queue of runs that survives kills, and the table of their results."""
