"""The main job on a laptop: its base model, its tiny model, its report."""
