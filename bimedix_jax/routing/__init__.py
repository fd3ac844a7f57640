"""What the routers do: expert load per layer, language and kind, and its picture."""
