"""Rules that check a translation without a model. Each rule raises flags by name."""
