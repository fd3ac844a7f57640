"""What the routers do: expert load per layer, language and kind, its plot, and routing plans on disk."""
